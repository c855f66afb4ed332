"""diffusers' files, both ways, against diffusers; the spellings that came before; and what a bad file says."""

import json

import peft
import pytest
import torch
from diffusers import StableDiffusionPipeline
from peft.utils import get_peft_model_state_dict
from safetensors.torch import load_file, save_file

import lorakit
from adapter.models import CASES
from formats.diffusion import (
    TEXT_LAYERS,
    UNET_LAYERS,
    UNEVEN,
    components,
    flux,
    outputs,
    pipeline_of,
    quiet,
    run_flux,
    run_unet,
    text_encoder,
    trained,
    unet,
)
from lorakit import Adapter, LoRAConfig
from lorakit.errors import AdapterFileError, TargetError
from lorakit.files import read_safetensors_header
from lorakit.formats import BaseFacts, Context, obstacles, recognise

NAME = "pytorch_lora_weights.safetensors"
SETTINGS = {
    "plain": {"alpha": 8.0},
    "uneven": {"alpha": 6.0, **UNEVEN},
    "rslora": {"alpha": 3.0, "scaling": "rslora", **UNEVEN},
}


def strip_header(file):
    save_file(load_file(file), file)


@pytest.fixture
def file(tmp_path):
    trained(model := unet(), LoRAConfig(r=4, alpha=6.0, target_modules=UNET_LAYERS, **UNEVEN))
    return lorakit.adapters(model).save("default", tmp_path, format="diffusers")


# ---------------------------------------------------------------- against diffusers


@pytest.mark.parametrize(
    ("setting", "xl", "header"),
    [
        *(("plain", False, True), ("rslora", False, True), ("uneven", False, False)),
        *(("uneven", True, True), ("rslora", True, False)),
    ],
)
def test_diffusers_reads_our_file_and_computes_what_we_compute(xl, setting, header, tmp_path):
    parts = components(xl=xl)
    layers = (*UNET_LAYERS, *TEXT_LAYERS, *(["text_projection"] if xl else []))
    trained(parts, LoRAConfig(r=4, target_modules=layers, **SETTINGS[setting]))
    expected = outputs(parts)
    written = lorakit.adapters(parts).save("default", tmp_path, format="diffusers")
    assert written == tmp_path / NAME
    if not header:
        strip_header(written)
    theirs, ours = components(xl=xl), components(xl=xl)
    quiet(pipeline_of(theirs).load_lora_weights, tmp_path)
    lorakit.attach(ours, tmp_path)
    for model in (theirs, ours):
        for name, output in outputs(model).items():
            torch.testing.assert_close(output, expected[name], rtol=1e-4, atol=1e-5)


def peft_config(layers, **changes):
    return peft.LoraConfig(
        **{"r": 4, "lora_alpha": 6, "target_modules": list(layers), "init_lora_weights": False} | changes
    )


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"use_rslora": True},
        {"rank_pattern": {"to_q": 2, "fc1": 3}, "alpha_pattern": {"to_q": 1, "to_v": 9, "fc2": 2}},
    ],
    ids=["plain", "rslora", "patterns"],
)
def test_we_read_what_a_pipeline_saves(changes, tmp_path):
    parts = components()
    torch.manual_seed(4)
    quiet(parts["unet"].add_adapter, peft_config(UNET_LAYERS, **changes))
    quiet(parts["text_encoder"].add_adapter, peft_config(TEXT_LAYERS, **changes))
    expected = outputs(parts.eval())
    quiet(
        StableDiffusionPipeline.save_lora_weights,
        tmp_path,
        unet_lora_layers=get_peft_model_state_dict(parts["unet"], adapter_name="default"),
        text_encoder_lora_layers=get_peft_model_state_dict(parts["text_encoder"], adapter_name="default"),
        unet_lora_adapter_metadata=_plain(parts["unet"].peft_config["default"]),
        text_encoder_lora_adapter_metadata=_plain(parts["text_encoder"].peft_config["default"]),
    )
    ours = components()
    lorakit.attach(ours, tmp_path)
    for name, output in outputs(ours).items():
        torch.testing.assert_close(output, expected[name], rtol=1e-4, atol=1e-5)


def _plain(config):
    return {key: sorted(value) if isinstance(value, set) else value for key, value in config.to_dict().items()}


def test_we_read_what_a_component_saves_and_it_reads_ours(tmp_path):
    theirs = unet()
    torch.manual_seed(4)
    theirs.add_adapter(peft_config(("to_q", "conv1"), lora_alpha=2), adapter_name="default")
    expected = run_unet(theirs)
    quiet(theirs.save_lora_adapter, tmp_path)
    ours = unet()
    lorakit.attach(ours, tmp_path)
    torch.testing.assert_close(run_unet(ours), expected, rtol=1e-4, atol=1e-5)
    parts = components()  # the same file for the whole pipeline
    lorakit.attach(parts, tmp_path)
    torch.testing.assert_close(run_unet(parts["unet"]), expected, rtol=1e-4, atol=1e-5)
    lorakit.adapters(ours).save("default", tmp_path / "b", format="diffusers")
    again = unet()
    quiet(again.load_lora_adapter, tmp_path / "b", prefix="unet", weight_name=NAME)
    torch.testing.assert_close(run_unet(again), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("alone", [True, False], ids=["transformer", "pipeline"])
def test_transformers_both_ways(alone, tmp_path):
    layers = ("to_q", "add_k_proj", "proj_out", "proj_mlp", "x_embedder")
    model = flux() if alone else torch.nn.ModuleDict({"transformer": flux()})
    value = trained(model, LoRAConfig(r=3, alpha=5.0, target_modules=layers, rank_pattern={"to_q": 2}))
    prefix = "" if alone else "transformer."
    assert f"{prefix}proj_out" in value.factors  # also the end of other paths
    expected = run_flux(model if alone else model["transformer"])
    lorakit.adapters(model).save("default", tmp_path, format="diffusers")
    theirs = flux()
    quiet(theirs.load_lora_adapter, tmp_path, weight_name=NAME)
    torch.testing.assert_close(run_flux(theirs), expected, rtol=1e-4, atol=1e-5)
    ours = flux()
    lorakit.attach(ours, tmp_path)
    torch.testing.assert_close(run_flux(ours), expected, rtol=1e-5, atol=1e-5)


def test_layers_that_end_like_others_are_the_only_ones_meant(tmp_path):
    model = flux()
    value = trained(model, LoRAConfig(r=3, target_modules="proj_out"))
    expected = run_flux(model)
    assert list(value.factors) == ["proj_out"]
    with pytest.raises(AdapterFileError, match="or the model is one: name it"):
        value.save(tmp_path, format="diffusers")
    value.save(tmp_path, format="diffusers", model=flux())
    other = flux()
    lorakit.attach(other, tmp_path)
    torch.testing.assert_close(run_flux(other), expected)


# ---------------------------------------------------------------- content


def test_names_and_header(file):
    tensors, header = read_safetensors_header(file)
    path = "unet.down_blocks.0.attentions.0.transformer_blocks.0.attn1"
    assert tensors[f"{path}.to_q.lora_A.weight"] == ("F32", (2, 16))
    assert tensors["unet.down_blocks.0.resnets.0.conv1.lora_A.weight"] == ("F32", (4, 16, 3, 3))
    settings = json.loads(header["lora_adapter_metadata"])
    assert (settings["unet.r"], settings["unet.lora_alpha"], settings["unet.peft_type"]) == (4, 4, "LORA")
    assert settings["unet.rank_pattern"] == settings["unet.alpha_pattern"]


def test_text_model_is_always_in_the_file_and_never_a_matter_for_the_model(tmp_path):
    for projecting in (False, True):
        model = text_encoder(projecting=projecting)
        value = trained(model, LoRAConfig(r=2, target_modules=TEXT_LAYERS))
        assert any(path.startswith("text_model.") for path in value.factors) == projecting
        value.save(tmp_path, format="diffusers")
        assert all(name.startswith("text_encoder.text_model.encoder.") for name in load_file(tmp_path / NAME))
        assert Adapter.load(tmp_path, model=model).factors.keys() == value.factors.keys()


def test_saving_what_was_loaded_gives_the_same_bytes(file, tmp_path):
    for base in (None, unet()):
        Adapter.load(file, model=base).save(tmp_path / "b.safetensors", format="diffusers")
        assert (tmp_path / "b.safetensors").read_bytes() == file.read_bytes()


def test_without_the_model_paths_are_the_files(file):
    value = Adapter.load(file)
    assert all(path.startswith("unet.") for path in value.factors)
    parts = components()
    lorakit.attach(parts, value)
    with pytest.raises(TargetError):
        lorakit.attach(unet(), value)


# ---------------------------------------------------------------- older spellings


def old_attention(value, side):
    """Attention processors: `processor.to_q_lora.down.weight`, before diffusers 0.25."""
    for path, f in value.factors.items():
        parent, _, last = path.removesuffix(".0").rpartition(".")
        yield f"{parent}.processor.{last}_lora.{side}.weight", f


def lora_module(value, side):
    for path, f in value.factors.items():
        yield f"{path}.lora.{side}.weight", f


@pytest.mark.parametrize("component", ["unet.", ""], ids=["component", "bare"])
@pytest.mark.parametrize("spelling", [old_attention, lora_module])
def test_older_spellings_of_a_unet_mean_what_diffusers_takes_them_for(spelling, component, tmp_path):
    model = unet()
    value = trained(model, LoRAConfig(r=4, alpha=4.0, target_modules=("to_q", "to_k", "to_v", "to_out.0")))
    expected = run_unet(model)
    tensors = {component + name: f.A for name, f in spelling(value, "down")}
    tensors |= {component + name: f.B for name, f in spelling(value, "up")}
    save_file(tensors, tmp_path / NAME)
    assert recognise(tmp_path) == "diffusers"
    for ours in (unet(), components()):
        lorakit.attach(ours, tmp_path)
        part = ours["unet"] if isinstance(ours, torch.nn.ModuleDict) else ours
        torch.testing.assert_close(run_unet(part), expected)
    theirs = unet()
    quiet(theirs.load_lora_adapter, tmp_path, prefix="unet" if component else None, weight_name=NAME)
    torch.testing.assert_close(run_unet(theirs), expected)


@pytest.mark.parametrize("old", [True, False], ids=["to_q_lora", "lora_linear_layer"])
def test_older_spellings_of_a_text_encoder(old, tmp_path):
    parts = components()
    value = trained(parts, LoRAConfig(r=4, alpha=4.0, target_modules=("q_proj", "k_proj", "v_proj", "out_proj", "fc1")))
    expected = outputs(parts)
    tensors = {}
    for path, f in value.factors.items():
        written = path.replace("text_encoder.", "text_encoder.text_model.")
        parent, _, last = written.rpartition(".")
        stem = (
            f"{parent}.to_{last.removesuffix('_proj')}_lora"
            if old and last != "fc1"
            else f"{written}.lora_linear_layer"
        )
        tensors |= {f"{stem}.down.weight": f.A, f"{stem}.up.weight": f.B}
    save_file(tensors, tmp_path / NAME)
    ours, theirs = components(), components()
    lorakit.attach(ours, tmp_path)
    quiet(pipeline_of(theirs).load_lora_weights, tmp_path)
    for model in (ours, theirs):
        torch.testing.assert_close(outputs(model)["text_encoder"], expected["text_encoder"], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("feed_forward_between", [False, True])
def test_the_numbered_tensors_of_the_first_trainer(feed_forward_between, tmp_path):
    parts = components()
    config = LoRAConfig(
        r=2,
        alpha=2.0,
        target_modules=("to_q", "to_k", "to_v", "to_out.0", "net.0.proj", "q_proj", "k_proj", "v_proj", "out_proj"),
    )
    value = trained(parts, config)
    expected = outputs(parts)
    numbered = {c: [p for p in value.factors if p.startswith(f"{c}.")] for c in ("unet", "text_encoder")}
    if feed_forward_between:
        blocks = {}
        for path in numbered["unet"]:
            blocks.setdefault(path.split(".transformer_blocks")[0], []).append(path)
        order = ("attn1", "ff", "attn2")
        numbered["unet"] = [
            path
            for block in blocks.values()
            for part in order
            for path in block
            if f".0.{part}." in path.split(".transformer_blocks")[1]
        ]
    tensors = {}
    for component, paths in numbered.items():
        for number, path in enumerate(paths):
            f = value.factors[path]
            tensors |= {f"{component}:{number}:down": f.A, f"{component}:{number}:up": f.B}
    header = {"unet": json.dumps(["CrossAttention", "GEGLU"]), "text_encoder": json.dumps(["CLIPAttention"])}
    save_file(tensors, tmp_path / "first.safetensors", header)
    ours = components()
    lorakit.attach(ours, tmp_path / "first.safetensors")
    for name, output in outputs(ours).items():
        torch.testing.assert_close(output, expected[name])
    with pytest.raises(AdapterFileError, match=r"numbered by the layers of the model: name it"):
        Adapter.load(tmp_path / "first.safetensors")
    for spoilt, message in (
        ({k: v for k, v in tensors.items() if k != "unet:3:up"}, "unet:3:up is missing"),
        ({k: v for k, v in tensors.items() if not k.startswith("unet:0")}, "not numbered from 0"),
        (tensors | {"<style>": torch.ones(3)}, "a word's embedding"),
        ({k: v for k, v in tensors.items() if not k.startswith(f"unet:{len(numbered['unet']) - 1}:")}, "such layers"),
    ):
        save_file(spoilt, tmp_path / "first.safetensors", header | {"<style>": "<embed>"})
        with pytest.raises(AdapterFileError, match=message):
            Adapter.load(tmp_path / "first.safetensors", model=components())


# ---------------------------------------------------------------- bad files


@pytest.mark.parametrize("name", ["gpt2", "llama", "bert"])
def test_language_models_are_no_pipelines(name):
    model = CASES[name].build()
    value = lorakit.attach(model, LoRAConfig(r=2, target_modules=CASES[name].targets)).extract()
    for context in (Context(), Context(base=BaseFacts.of(model))):
        assert "of no component of a diffusion pipeline" in obstacles(value, "diffusers", context)[0]


def rewrite(file, change=None, header=None):
    tensors = load_file(file)
    metadata = read_safetensors_header(file)[1]
    if change:
        change(tensors)
    settings = json.loads(metadata["lora_adapter_metadata"]) | (header or {})
    save_file(tensors, file, metadata | {"lora_adapter_metadata": json.dumps(settings)})


def test_every_bad_tensor_is_listed_in_one_error(file):
    stem = "unet.mid_block.attentions.0.transformer_blocks.0.attn1"

    def spoil(tensors):
        del tensors[f"{stem}.to_q.lora_B.weight"]
        tensors[f"{stem}.to_k.lora_A.weight"] = torch.ones(3, 5)
        tensors[f"{stem}.to_v.lora_magnitude_vector"] = torch.ones(3)
        tensors[f"{stem}.to_v.alpha"] = torch.tensor(2.0)
        tensors["unet.down_blocks.7.conv.lora_A.weight"] = torch.ones(2, 2)
        tensors["unet.down_blocks.0.resnets.0.conv1.lora.down.weight"] = torch.ones(4, 16, 3, 3)
        tensors["text_encoder.text_model.encoder.layers.0.mlp.fc1.lora_A.weight"] = torch.ones(2, 2)
        tensors["surprise"] = torch.ones(1)

    rewrite(file, spoil)
    with pytest.raises(AdapterFileError) as caught:
        Adapter.load(file, model=unet())
    for part in (
        f"{stem}.to_q: lora_B is missing",
        f"{stem}.to_k: its factors (3, 5) and (32, 3) do not fit the model's weight (32, 32)",
        "to_v.lora_magnitude_vector: DoRA",
        f"{stem}.to_v: has an alpha of its own and one in the header",
        "unet.down_blocks.7.conv: no such layer in the model; nearest: unet.down_blocks.",
        "conv1.lora_A.weight: a second A of unet.down_blocks.0.resnets.0.conv1",
        "text_encoder.text_model.encoder.layers.0.mlp.fc1: no such layer",
        "surprise: unexpected",
    ):
        assert part in str(caught.value)


@pytest.mark.parametrize(
    ("header", "message"),
    [
        ({"unet.use_dora": True}, "use_dora is True"),
        ({"unet.peft_type": "LOHA"}, "LOHA"),
        ({"unet.r": 9}, "rank 4 in the tensors, 9 in the header"),
        ({"stray": 1}, "stray is a setting of no component"),
    ],
)
def test_settings_that_would_change_the_function_are_refused(file, header, message):
    rewrite(file, header=header)
    with pytest.raises(AdapterFileError, match=message):
        Adapter.load(file)


def test_damage_nan_and_a_header_that_is_no_json(file, tmp_path):
    data = file.read_bytes()
    rewrite(file, lambda tensors: next(iter(tensors.values())).fill_(float("inf")))
    with pytest.raises(AdapterFileError, match="NaN or infinite"):
        Adapter.load(file)
    save_file(load_file(file), file, {"lora_adapter_metadata": "{"})
    with pytest.raises(AdapterFileError, match="not JSON"):
        Adapter.load(file)
    file.write_bytes(data[:-10])
    with pytest.raises(AdapterFileError, match="cut short"):
        Adapter.load(file, format="diffusers")
    with pytest.raises(AdapterFileError, match="did you mean"):
        Adapter.load(tmp_path / "pytorch_lora_weight.safetensors")
