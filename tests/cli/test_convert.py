"""`lorakit convert` and `lorakit export`: any format to any other, and what a target cannot carry, told beforehand."""

import json
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner

import lorakit
from adapter.models import CASES
from formats.diffusion import TEXT_LAYERS, components, trained, unet
from lorakit import Adapter, LoRAConfig
from lorakit.adapter.blank import blank_adapter
from lorakit.cli import main
from lorakit.formats import CODECS, obstacles
from lorakit.models import load_skeleton


@pytest.fixture(scope="module")
def pipeline(tmp_path_factory):
    """A pipeline's folder without any weights."""
    folder = tmp_path_factory.mktemp("pipeline")
    parts = components(xl=True)
    parts["unet"].save_config(folder / "unet")
    for name in ("text_encoder", "text_encoder_2"):
        parts[name].config.save_pretrained(folder / name)
    index = {
        "_class_name": "StableDiffusionXLPipeline",
        "unet": ["diffusers", "UNet2DConditionModel"],
        "text_encoder": ["transformers", "CLIPTextModel"],
        "text_encoder_2": ["transformers", "CLIPTextModelWithProjection"],
        "tokenizer": ["transformers", "CLIPTokenizer"],
        "image_encoder": [None, None],
    }
    (folder / "model_index.json").write_text(json.dumps(index))
    return folder


@pytest.fixture(scope="module")
def style(tmp_path_factory):
    """An adapter of such a pipeline, in PEFT's format."""
    parts = components(xl=True)
    config = LoRAConfig(r=3, alpha=5.0, scaling="rslora", target_modules=("to_q", "conv1", *TEXT_LAYERS))
    return trained(parts, config).save(tmp_path_factory.mktemp("style") / "a")


def run(*arguments):
    result = CliRunner().invoke(main, [*map(str, arguments), "--json"])
    return result, json.loads(result.stdout.splitlines()[-1])


def same(one, other):
    assert one.factors.keys() == other.factors.keys()
    for path in one.factors:
        torch.testing.assert_close(one.delta(path), other.delta(path), rtol=1e-5, atol=1e-6)


def test_skeletons_have_every_layer_and_no_weight(pipeline, base):
    parts = components(xl=True)
    for skeleton, model in (
        (load_skeleton(pipeline), parts),
        (load_skeleton(pipeline / "unet"), parts["unet"]),
        (load_skeleton(base), lorakit.load_model(base)[0]),
    ):
        expected = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
        assert {name: tuple(parameter.shape) for name, parameter in skeleton.named_parameters()} == expected
        assert {parameter.device.type for parameter in skeleton.parameters()} == {"meta"}


def test_a_model_that_is_no_language_model_has_a_skeleton_too(tmp_path):
    model = CASES["vit"].build()
    model.save_pretrained(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    assert [name for name, _ in load_skeleton(tmp_path).named_parameters()] == [n for n, _ in model.named_parameters()]


@pytest.mark.parametrize("lora_bias", [False, True])
def test_a_blank_adapter_is_what_attaching_would_make(llama, lora_bias):
    config = LoRAConfig(r=3, rank_pattern={"q_proj": 2}, lora_bias=lora_bias, modules_to_save=("norm",))
    expected = lorakit.attach(llama, config).extract()
    blank = blank_adapter(lorakit.adapters(llama).detach(), config)
    assert {n: t.shape for n, t in blank.tensors().items()} == {n: t.shape for n, t in expected.tensors().items()}
    assert {p: (f.alpha, f.kind) for p, f in blank.factors.items()} == {
        p: (f.alpha, f.kind) for p, f in expected.factors.items()
    }


def test_around_through_every_diffusion_format(style, pipeline, tmp_path):
    places = [style, tmp_path / "k.safetensors", tmp_path / "d.safetensors", tmp_path / "p"]
    for source, (target, place) in zip(
        places, zip(("kohya", "diffusers", "peft"), places[1:], strict=True), strict=False
    ):
        result, told = run("convert", source, "--to", target, "--output", place, "--model", pipeline)
        assert result.exit_code == 0, result.output
        assert (told["ok"], told["to"], told["output"]) == (True, target, str(place))
        assert told["layers"] == len(Adapter.load(style).factors)
        same(Adapter.load(place, model=load_skeleton(pipeline)), Adapter.load(style))
    lorakit.attach(components(xl=True), places[-1])


def test_the_base_that_the_adapter_names_is_used(style, pipeline, tmp_path):
    config = style / "adapter_config.json"
    values = json.loads(config.read_text()) | {"base_model_name_or_path": str(pipeline)}
    named = tmp_path / "named"
    named.mkdir()
    (named / "adapter_config.json").write_text(json.dumps(values))
    (named / "adapter_model.safetensors").write_bytes((style / "adapter_model.safetensors").read_bytes())
    value = Adapter.load(style)
    value.save(tmp_path / "plain.safetensors", format="kohya")
    result, _ = run("convert", named, "--to", "kohya", "--output", tmp_path / "k.safetensors")
    assert result.exit_code == 0, result.output
    assert (tmp_path / "k.safetensors").read_bytes() == (tmp_path / "plain.safetensors").read_bytes()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["STYLE", "--to", "koya", "--output", "OUT"], "did you mean 'kohya'?"),
        (["STYLE", "--to", "peft", "--output", "STYLE"], "is the adapter itself"),
        (["STYLE", "--from", "kohya", "--to", "peft", "--output", "OUT"], "No such file"),
        (["LANGUAGE", "--to", "kohya", "--output", "OUT"], "of no component of a diffusion pipeline"),
        (["NONE", "--to", "kohya", "--output", "OUT"], "no such file or folder"),
        (["STYLE", "--to", "kohya", "--output", "OUT", "--model", "no/such/model"], "no such folder or file"),
    ],
)
def test_one_clear_error_and_nothing_written(arguments, message, style, adapter, tmp_path):
    places = {"STYLE": style, "LANGUAGE": adapter, "NONE": tmp_path / "none", "OUT": tmp_path / "out.safetensors"}
    result, told = run("convert", *(places.get(a, a) for a in arguments))
    assert result.exit_code == 2
    assert message.casefold() in told["error"]["message"].casefold()
    assert "Traceback" not in result.output
    assert not any(tmp_path.iterdir())


def test_a_file_whose_names_need_the_model_says_so(style, tmp_path):
    Adapter.load(style).save(tmp_path / "k.safetensors", format="kohya")
    result, told = run("convert", tmp_path / "k.safetensors", "--to", "peft", "--output", tmp_path / "p")
    assert result.exit_code == 2
    assert "--model M" in told["error"]["message"]


# ---------------------------------------------------------------- export


def test_export_writes_what_convert_writes(style, pipeline, tmp_path):
    arguments = ("--to", "kohya", "--model", pipeline)
    run("convert", style, *arguments, "--output", tmp_path / "a.safetensors")
    result, told = run("export", "--adapter", style, *arguments, "--output", tmp_path / "b.safetensors")
    assert result.exit_code == 0, result.output
    assert told["bytes"] == (tmp_path / "b.safetensors").stat().st_size
    assert (tmp_path / "a.safetensors").read_bytes() == (tmp_path / "b.safetensors").read_bytes()


def test_export_takes_apart_what_began_as_a_part_of_the_weight(base, adapter, tmp_path):
    model, _ = lorakit.load_model(base, dtype="fp32", device="cpu")
    handle = lorakit.attach(model, LoRAConfig(r=2, init="olora"))
    with torch.no_grad():
        for tensor in handle.trainable_tensors().values():
            tensor.add_(torch.linspace(-0.1, 0.1, tensor.numel()).view(tensor.shape))
    handle.save("default", tmp_path / "a")
    arguments = ("export", "--to", "peft-residual", "--model", base, "--adapter")
    result, told = run(*arguments, tmp_path / "a", "--output", tmp_path / "r")
    assert result.exit_code == 0, result.output
    assert (told["rank"], told["merge"]["proof"]["passed"]) == (2, True)
    assert Adapter.load(told["adapter"]).base.name == told["base"] == str(tmp_path / "r" / "base")
    result, told = run(*arguments, adapter, "--output", tmp_path / "other")
    assert result.exit_code == 2
    assert "this one did not" in told["error"]["message"]
    assert not (tmp_path / "other").exists()


def test_what_targets_ask_for_is_passed_on(adapter, tmp_path):
    result, told = run(
        "export", "--adapter", adapter, "--to", "ollama", "--base-reference", "llama3.2", "--output", tmp_path / "o"
    )
    assert result.exit_code == 0, result.output
    assert told["output"] == str(tmp_path / "o")
    assert "FROM llama3.2" in (tmp_path / "o" / "Modelfile").read_text()
    sizes = {}
    for kind in ("f32", "f16"):
        result, told = run(
            "convert", adapter, "--to", "gguf", "--tensor-type", kind, "--output", tmp_path / f"{kind}.gguf"
        )
        assert result.exit_code == 0, result.output
        sizes[kind] = told["bytes"]
    assert sizes["f16"] < 0.7 * sizes["f32"]
    result, told = run("convert", adapter, "--to", "loralib", "--enable-lora", "yes,no", "--output", tmp_path / "x.pt")
    assert result.exit_code == 2
    assert "true,false,true" in told["error"]["message"]


def test_language_adapters_go_around_too(adapter, base, tmp_path):
    places = [adapter, tmp_path / "a.gguf", tmp_path / "b.pt", tmp_path / "p"]
    for source, target, place in zip(places, ("gguf", "loralib", "peft"), places[1:], strict=False):
        flags = ("--model", base, "--alpha", "7") if target == "loralib" or source == places[2] else ("--model", base)
        result, _ = run("convert", source, "--to", target, "--output", place, *flags)
        assert result.exit_code == 0, result.output
    same(Adapter.load(places[-1]), Adapter.load(adapter))
    lorakit.attach(lorakit.load_model(base)[0], places[-1], check_base=False)


def test_the_name_of_the_base_goes_with_the_file(style, tmp_path):
    from dataclasses import replace

    value = Adapter.load(style)
    value = replace(
        value, base=replace(value.base, name="here/style"), metadata={"title": "ink", "ss_network_dim": "9"}
    )
    for target, known in (("kohya", components(xl=True)), ("diffusers", None)):
        again = Adapter.load(value.save(tmp_path / f"{target}.safetensors", format=target), model=known)
        assert again.base.name == "here/style"
        assert again.metadata == {"title": "ink"}  # what told of the file's old tensors is gone
        lorakit.attach(components(xl=True), tmp_path / f"{target}.safetensors")  # the base is named, not pinned


def test_lint_before_training_names_what_the_target_cannot_carry(pipeline, tmp_path):
    settings = ("--model", pipeline, "--target-modules", "to_q,token_embedding", "--modules-to-save", "conv_out")
    result, told = run("export", "--lint", "--to", "kohya", *settings)
    assert result.exit_code == 2
    assert not told["ok"]
    named = " ".join(told["obstacles"])
    assert "text_encoder.embeddings.token_embedding: the update of an embedding" in named
    assert "unet.conv_out.weight: trained whole" in named
    assert "token_embedding" in result.stderr
    result, told = run("export", "--lint", "--to", "kohya", "--model", pipeline, "--target-modules", "to_q", "--r", "2")
    assert (result.exit_code, told["ok"], told["obstacles"]) == (0, True, [])
    flags = ("--model", pipeline, "--target-modules", "to_q", "--lora-bias")
    result, told = run("export", "--lint", "--to", "kohya", *flags)
    assert result.exit_code == 2
    assert all(problem.endswith("merge into a base with biases") for problem in told["obstacles"])
    assert not any(tmp_path.iterdir())


def test_lint_reads_the_settings_of_a_run(pipeline, tmp_path):
    values = {"model": str(pipeline), "data": "x.jsonl", "output": "runs/x", "epochs": 2}
    values["lora"] = {"target_modules": ["to_q", "token_embedding"], "rank_pattern": {"to_q": 3}}
    (tmp_path / "run.yaml").write_text(json.dumps(values))
    result, told = run("export", "--lint", "--to", "diffusers", "--config", tmp_path / "run.yaml")
    assert result.exit_code == 2, result.output
    assert len(told["obstacles"]) == 2
    assert told["model"] == str(pipeline)
    (tmp_path / "run.yaml").write_text(json.dumps(values | {"epoch": 3}))
    result, told = run("export", "--lint", "--to", "diffusers", "--config", tmp_path / "run.yaml")
    assert "did you mean epochs" in told["error"]["message"]


@pytest.mark.parametrize("target", CODECS)
def test_lint_says_what_exporting_would(target, base, adapter):
    result, told = run("export", "--lint", "--to", target, "--adapter", adapter)
    context = lorakit.formats.Context(base=lorakit.formats.BaseFacts.of(load_skeleton(base)), base_reference=base)
    expected = obstacles(Adapter.load(adapter), target, context)
    assert sorted(told["obstacles"]) == sorted(expected)
    assert result.exit_code == (2 if expected else 0)
    planned, told = run("export", "--lint", "--to", target, "--model", base, "--r", "4")
    assert sorted(told["obstacles"]) == sorted(expected)
    assert planned.exit_code == result.exit_code


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--to", "kohya"], "export needs --adapter and --output"),
        (["--to", "kohya", "--lint"], "--lint needs --adapter, or --model"),
        (
            ["--to", "kohya", "--adapter", "STYLE", "--r", "4", "--lint"],
            "--r is a setting of an adapter yet to be trained",
        ),
        (["--to", "kohya", "--adapter", "STYLE"], "export needs --output"),
        (["--to", "kohya", "--model", "PIPELINE", "--lint", "--target-modules", "to_qq"], "did you mean"),
    ],
)
def test_what_export_needs(arguments, message, style, pipeline):
    places = {"STYLE": style, "PIPELINE": pipeline}
    result, told = run("export", *(places.get(a, a) for a in arguments))
    assert result.exit_code == 2
    assert message in told["error"]["message"]


def test_a_pipeline_that_is_damaged_says_where(pipeline, tmp_path):
    broken = tmp_path / "broken"
    broken.mkdir()
    index = json.loads((pipeline / "model_index.json").read_text())
    for change, message in (
        ({"unet": ["diffusers", "NoSuchModel"]}, "has no model 'NoSuchModel'"),
        ({"unet": ["os", "system"]}, "a class of os"),
        ({"unet": "UNet"}, "not a library and a class"),
        ({}, "could not be made"),
    ):
        (broken / "model_index.json").write_text(json.dumps(index | change))
        result, told = run("export", "--lint", "--to", "kohya", "--model", broken)
        assert result.exit_code == 2
        assert message in told["error"]["message"]


def test_an_alone_component_is_a_model_too(pipeline, tmp_path):
    value = trained(model := unet(), LoRAConfig(r=2, target_modules=("to_q",)))
    model.save_config(tmp_path / "unet")
    value.save(tmp_path / "p")
    result, _ = run(
        "export", "--adapter", tmp_path / "p", "--to", "kohya", "--model", tmp_path / "unet", "--output", tmp_path / "k"
    )
    assert result.exit_code == 0, result.output
    same(Adapter.load(tmp_path / "k", model=unet()), value)


def test_what_lies_beside_the_adapter_goes_along_and_nothing_is_overwritten(base, adapter, tmp_path):
    result, _ = run("convert", adapter, "--to", "peft", "--output", tmp_path / "a")
    assert result.exit_code == 0, result.stderr
    for name in ("tokenizer.json", "chat_template.jinja"):
        assert (tmp_path / "a" / name).read_bytes() == (Path(adapter) / name).read_bytes()
    result, _ = run("convert", adapter, "--to", "gguf", "--model", base, "--output", tmp_path / "a")
    assert result.exit_code == 2
    assert "something is there already" in result.stderr
    result, _ = run("convert", adapter, "--to", "loralib", "--model", base, "--output", tmp_path / "b.pt")
    assert result.exit_code == 0, result.stderr
    assert "loralib holds no tokenizer or chat template" in result.stderr
