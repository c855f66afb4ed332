"""Quantised bases as a whole: loaded, trained on, recorded, attached elsewhere, merged, exported, refused."""

import json

import gguf
import pytest
import torch
from torch import nn
from transformers import Gemma2Config, Gemma2ForCausalLM, GPT2Config, Qwen2Config, Qwen2ForCausalLM

import lorakit
from gguf_files import write_gguf, write_renamed
from lorakit import Adapter, LoRAConfig, cli, machine, models
from lorakit.adapter import fingerprint
from lorakit.checkpoints.gguf import GgufWeights
from lorakit.core.cross_entropy import cross_entropy_sum
from lorakit.core.layer import base_parameters
from lorakit.data.batches import collate
from lorakit.data.chat import Example
from lorakit.data.sources import Origin
from lorakit.errors import AdapterError, AdapterMismatchError, ConfigError, ModelError
from lorakit.merging import merge
from lorakit.packing import packed_logits
from lorakit.quant.tensor import QuantizedTensor, as_dense, format_of, stored_tensors
from lorakit.training.loop import ready
from lorakit.training.planning import Planner
from lorakit.training.verify import weights_checksum
from tiny_models import DECODER_SIZES, byte_tokenizer, tiny_llama
from tiny_runs import metrics, save_data

KINDS = ["Q4_0", "Q8_0", "Q4_K", "Q6_K"]


@pytest.fixture(scope="module", params=KINDS)
def spec(request, tmp_path_factory):
    """A Llama in a GGUF file, wide enough for blocks of 256."""
    folder = tmp_path_factory.mktemp(request.param)
    model = tiny_llama(vocabulary=len(byte_tokenizer()), hidden_size=256, intermediate_size=256, initializer_range=0.05)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LORAKIT_CACHE", str(folder / "cache"))
        yield write_gguf(folder / "tiny.gguf", model, gguf.GGMLQuantizationType[request.param])


@pytest.fixture
def base_folder(tmp_path):
    """A Llama of plain weights with a tokenizer, for int8 and NF4."""
    tiny_llama(hidden_size=64, initializer_range=0.1).save_pretrained(tmp_path / "base")
    byte_tokenizer(eos="<|im_end|>").save_pretrained(tmp_path / "base")
    return str(tmp_path / "base")


def load(spec, quantize="auto", dtype="fp32"):
    return models.load_weights(spec, dtype, "cpu", quantize)


def packed_bytes(model):
    return {k: part.clone() for n, p in base_parameters(model).items() for k, part in stored_tensors(n, p.detach())}


def examples(count=6):
    torch.manual_seed(0)
    rows = [torch.randint(0, 250, (5 + 3 * i,)).tolist() for i in range(count)]
    return [Example(row, [False] + [True] * (len(row) - 1), Origin("rows", i)) for i, row in enumerate(rows)]


def losses(model, steps=4, **settings):
    """Losses of a few steps, the fast way (fused, packed, prefixes shared)."""
    handle = lorakit.attach(model, LoRAConfig(r=4, **settings), seed=0)
    optimizer = torch.optim.AdamW(handle.trainable_parameters(), lr=1e-2)
    rows, found = examples(), []
    with ready(model, 40) as share:
        for _ in range(steps):
            batch = collate(rows, range(len(rows)), share=share)
            loss = cross_entropy_sum(packed_logits(model, batch), batch.targets) / len(batch.targets)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            found.append(loss.item())
    return handle, found


# ---------------------------------------------------------------- a GGUF file's blocks


def test_a_gguf_file_keeps_its_blocks_and_is_the_model_that_transformers_makes_of_it(spec):
    kept, dense = load(spec), load(spec, "none")
    assert [n for n, _ in kept.named_parameters()] == [n for n, _ in dense.named_parameters()]
    for (name, ours), theirs in zip(kept.named_parameters(), dense.parameters(), strict=True):
        assert isinstance(ours, QuantizedTensor) == (theirs.ndim == 2), name
        assert not ours.requires_grad
        assert torch.equal(as_dense(ours), theirs), name
    for (name, ours), theirs in zip(kept.named_buffers(), dense.buffers(), strict=True):
        assert torch.equal(ours, theirs), name
        assert ours.dtype == theirs.dtype
    assert kept.lm_head.weight is kept.model.embed_tokens.weight
    assert kept.name_or_path == dense.name_or_path == spec
    assert kept.generation_config.to_dict() == dense.generation_config.to_dict()
    assert not kept.training
    ids = torch.arange(12).view(2, 6)
    with torch.no_grad():
        assert torch.equal(kept(ids).logits, dense(ids).logits)
    assert kept.generate(ids, max_new_tokens=4, do_sample=False).tolist() == (
        dense.generate(ids, max_new_tokens=4, do_sample=False).tolist()
    )


def test_what_is_in_memory_is_what_the_file_says(spec):
    model = load(spec)
    held = sum(part.nbytes for part in packed_bytes(model).values())
    weights = GgufWeights(models.Path(spec), models.load_skeleton(spec))
    assert held == sum(weights.nbytes(name, torch.float32) for name in base_parameters(model))
    assert held < models.Path(spec).stat().st_size
    up = model.model.layers[0].mlp.up_proj.weight
    assert up.parts[0].untyped_storage().nbytes() < models.Path(spec).stat().st_size  # a view of the mapped file


def test_the_config_and_the_tokenizer_need_no_conversion(spec):
    models.load_tokenizer(spec)
    models.load_skeleton(spec)
    before = {path.name for path in models.described_gguf(spec).parent.iterdir()}
    assert any("-about-" in name for name in before)


@pytest.mark.parametrize("settings", [{}, {"delta": "dora"}, {"target_modules": "all", "r": 2}], ids=str)
def test_it_trains_as_its_dequantised_twin(spec, settings):
    settings = {"target_modules": "all-linear", **settings}
    if settings["target_modules"] == "all":
        settings["target_modules"] = ["q_proj", "embed_tokens", "lm_head"]
    settings.pop("r", None)
    kept, dense = load(spec), load(spec, "none")
    before, checksum = packed_bytes(kept), weights_checksum(kept)
    ours, found = losses(kept, **settings)
    theirs, expected = losses(dense, **settings)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=0)
    assert found[-1] < found[0]
    assert weights_checksum(kept) == checksum
    ours.detach()
    after = packed_bytes(kept)
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    with torch.no_grad():
        ids = torch.arange(6).view(1, 6)
        assert torch.equal(kept(ids).logits, theirs.detach()(ids).logits)


def test_in_bf16_too(spec):
    _, found = losses(load(spec, dtype="bf16"))
    _, expected = losses(load(spec, "none", dtype="bf16"))
    torch.testing.assert_close(found, expected, rtol=2e-2, atol=0)


def test_the_plain_path_has_the_same_gradients(spec):
    """Without fused kernels: torch's own linear under autograd."""
    ids = torch.arange(10).view(2, 5)
    grads = []
    for model in (load(spec), load(spec, "none")):
        handle = lorakit.attach(model, LoRAConfig(r=2, dropout=1e-9), seed=0)  # dropout: no fused node
        model.train()
        model(ids, labels=ids).loss.backward()
        grads.append([p.grad for p in handle.trainable_parameters()])
    torch.testing.assert_close(*grads, rtol=1e-4, atol=1e-6)


def test_an_adapter_made_on_blocks_fits_the_dense_model_and_the_reverse(spec, tmp_path):
    kept, dense = load(spec), load(spec, "none")
    handle, _ = losses(kept)
    value = handle.extract()
    assert value.base.storage == "blocks"
    assert fingerprint.differences(value.base, lorakit.attach(load(spec), value).base_info()) == []
    there = lorakit.attach(dense, value)
    ids = torch.arange(6).view(1, 6)
    with torch.no_grad():
        torch.testing.assert_close(dense(ids).logits, kept(ids).logits, rtol=1e-5, atol=1e-5)
    assert there.base_info().storage == "none"
    handle.save("default", tmp_path / "adapter")
    assert Adapter.load(tmp_path / "adapter").base.storage == "blocks"
    assert models.agreed_storage([Adapter.load(tmp_path / "adapter")], spec) == "blocks"


def test_moving_folding_and_copying_leave_the_blocks_alone(spec):
    model = load(spec)
    handle, _ = losses(model)
    before = packed_bytes(model)
    own = model.model.layers[0].mlp.up_proj.weight
    ids = torch.arange(6).view(1, 6)
    with torch.no_grad():
        adapted = model(ids).logits
        with handle.merged():
            assert not isinstance(model.model.layers[0].mlp.up_proj.weight, QuantizedTensor)
            torch.testing.assert_close(model(ids).logits, adapted, rtol=1e-4, atol=1e-4)
        assert model.model.layers[0].mlp.up_proj.weight is own
        torch.testing.assert_close(model(ids).logits, adapted, rtol=0, atol=0)
    after = packed_bytes(model)
    assert all(torch.equal(before[name], after[name]) for name in before)
    plain = handle.detach().to(torch.bfloat16)
    assert plain.lm_head.weight is plain.model.embed_tokens.weight
    assert isinstance(plain.model.embed_tokens.weight, QuantizedTensor)
    with pytest.raises(AdapterError, match="is no plain tensor and is not saved as one"):
        plain.save_pretrained(models.Path(spec).parent / "out")


def test_merging_in_memory_is_refused_with_what_would_survive(spec):
    model = load(spec)
    handle, _ = losses(model, steps=2)
    readable_only = spec.split("/")[-2].startswith(("Q4_K", "Q6_K"))
    told = "cannot be told" if readable_only else r"of the update [\d.]+% would survive"
    with pytest.raises(
        AdapterError, match=rf"14 of the weights to change are quantised[\s\S]*{told}[\s\S]*lorakit merge"
    ):
        handle.merge(minimum_survival=0)
    if not readable_only:
        report = handle.merge_report()
        assert set(report.dtypes) == {format_of(model.model.layers[0].mlp.up_proj.weight)}
        assert 0 <= report.survived <= 1
    assert handle.active == {"default": 1.0}


def test_whole_trained_modules_are_dense_copies(spec):
    model = load(spec)
    handle = lorakit.attach(model, LoRAConfig(r=2, target_modules=["q_proj"], modules_to_save=["o_proj"]))
    trained = [p for p in handle.trainable_parameters() if p.ndim == 2 and p.shape == (256, 256)]
    assert [type(p) for p in trained] == [nn.Parameter] * 2
    ids = torch.arange(6).view(1, 6)
    model(ids, labels=ids).loss.backward()
    assert all(p.grad is not None for p in trained)


# ---------------------------------------------------------------- other architectures


def small(kind, settings=None, **changes):
    torch.manual_seed(0)
    return kind(settings(**{**DECODER_SIZES, "intermediate_size": 64, "initializer_range": 0.1, **changes})).eval()


@pytest.mark.parametrize("name", ["qwen2", "gemma2", "gpt2"])
def test_other_architectures_are_what_transformers_makes_of_them(name, tmp_path):
    """A shift of norms, biases, transposed matrices: all undone as transformers undoes it."""
    from transformers import AutoModelForCausalLM, GgufConfig, GPT2LMHeadModel

    from lorakit import quantised_base
    from lorakit.gguf_cache import quiet

    if name == "qwen2":
        model = small(Qwen2ForCausalLM, Qwen2Config)
        write_renamed(tmp_path / "m.gguf", model, name)
    elif name == "gemma2":
        model = small(Gemma2ForCausalLM, Gemma2Config, head_dim=8)
        write_renamed(tmp_path / "m.gguf", model, name, one_more=("norm.weight",))
    else:
        torch.manual_seed(0)
        model = GPT2LMHeadModel(GPT2Config(vocab_size=97, n_embd=32, n_layer=2, n_head=4, n_positions=64)).eval()
        swapped = ("c_attn.weight", "c_proj.weight", "c_fc.weight")
        write_renamed(tmp_path / "m.gguf", model, name, transposed=swapped)
    with quiet(progress_bars=False):
        theirs, report = AutoModelForCausalLM.from_pretrained(
            tmp_path,
            gguf_file="m.gguf",
            config=model.config,
            dtype=torch.float32,
            quantization_config=GgufConfig(dequantize=True),
            output_loading_info=True,
        )
    assert not report["missing_keys"]
    with torch.device("meta"):
        skeleton = type(model)(model.config)
    ours = quantised_base.from_blocks(tmp_path / "m.gguf", skeleton, torch.device("cpu"))
    for (path, own), other in zip(ours.named_parameters(), theirs.parameters(), strict=True):
        assert isinstance(own, QuantizedTensor) == (other.ndim == 2), path
        assert torch.equal(as_dense(own), other), path
    for (path, own), other in zip(ours.named_buffers(), theirs.buffers(), strict=True):
        assert torch.equal(own, other), path
    ids = torch.arange(8).view(1, 8)
    with torch.no_grad():
        torch.testing.assert_close(ours(ids).logits, theirs.eval()(ids).logits)
    handle = lorakit.attach(ours, LoRAConfig(r=2))
    ours(ids, labels=ids).loss.backward()
    assert all(p.grad is not None for p in handle.trainable_parameters())


@pytest.mark.parametrize("quantize", ["blocks", "auto"])
def test_types_and_architectures_that_cannot_be_kept_are_named(quantize, tmp_path, monkeypatch):
    monkeypatch.setenv("LORAKIT_CACHE", str(tmp_path / "cache"))
    model = tiny_llama(vocabulary=len(byte_tokenizer()))
    path = write_gguf(tmp_path / "a.gguf", model, gguf.GGMLQuantizationType.Q8_0)
    weights = GgufWeights(models.Path(path), models.load_skeleton(path))
    assert set(weights.shapes) == {n for n, _ in model.named_parameters(remove_duplicate=False)}
    skeleton = models.load_skeleton(path)
    skeleton.config.model_type = "strange"
    data = models.Path(path).read_bytes().replace(b"\x05\0\0\0\0\0\0\0llama", b"\x05\0\0\0\0\0\0\0lxama")
    (tmp_path / "b.gguf").write_bytes(data)
    with pytest.raises(ModelError, match=r"architecture 'lxama' cannot be kept yet; load it dense: quantize 'none'"):
        GgufWeights(tmp_path / "b.gguf", skeleton)
    larger = tiny_llama(vocabulary=len(byte_tokenizer()), num_hidden_layers=3)
    with pytest.raises(ModelError, match=r"missing: model\.layers\.2\.") as caught:
        GgufWeights(models.Path(path), larger.to("meta"))
    assert "quantize 'none'" in str(caught.value)


# ---------------------------------------------------------------- int8 and NF4


@pytest.mark.parametrize("quantize", ["int8", "nf4"])
def test_a_folder_is_quantised_while_it_is_read(base_folder, quantize):
    model, original = load(base_folder, quantize), load(base_folder)
    assert [n for n, _ in model.named_parameters()] == [n for n, _ in original.named_parameters()]
    for (name, ours), theirs in zip(model.named_parameters(), original.parameters(), strict=True):
        linear = name.endswith("_proj.weight")
        assert format_of(ours) == (quantize if linear else None), name
        error = (as_dense(ours) - theirs).norm() / theirs.norm()
        assert error < {"int8": 0.01, "nf4": 0.11}[quantize] if linear else torch.equal(ours, theirs), name
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert model.generation_config.to_dict() == original.generation_config.to_dict()
    handle, found = losses(model)
    assert found[-1] < found[0]
    assert handle.base_info().storage == quantize
    again = lorakit.attach(load(base_folder, quantize), handle.extract())  # the same numbers every time
    assert again.base_info() == handle.base_info()
    with pytest.raises(AdapterMismatchError, match=rf"sampled weights differ \(made on .* in {quantize}, this is"):
        lorakit.attach(load(base_folder), handle.extract())


def test_a_gguf_file_can_be_quantised_anew(spec):
    model = load(spec, "nf4")
    assert {format_of(p) for p in model.parameters()} == {None, "nf4"}


def test_what_cannot_be_held_so_is_refused(base_folder, tmp_path):
    with pytest.raises(ConfigError, match="is no GGUF file, so it has no blocks to keep; choose int8 or nf4"):
        load(base_folder, "blocks")
    with pytest.raises(ConfigError, match="quantize: unknown 'int4'; allowed: auto, none, blocks, int8, nf4"):
        load(base_folder, "int4")
    (models.Path(base_folder) / "model.safetensors").rename(tmp_path / "elsewhere")
    with pytest.raises(ModelError, match="cannot be quantised while it is read; load it with quantize 'none'"):
        load(base_folder, "nf4")


def test_adapters_of_bases_held_in_different_ways_are_not_mixed(base_folder):
    made = {}
    for quantize in ("none", "int8", "nf4"):
        made[quantize] = lorakit.attach(load(base_folder, quantize), LoRAConfig(r=2)).extract()
        assert models.agreed_storage([made[quantize]], base_folder) == quantize
    with pytest.raises(ConfigError, match=r"held in different ways \(int8, nf4\)"):
        models.agreed_storage([made["int8"], made["nf4"]], base_folder)
    assert models.agreed_storage([made["int8"]], base_folder, "none") == "none"
    assert models.agreed_storage([], base_folder) == "auto"


# ---------------------------------------------------------------- runs, merges, exports


@pytest.fixture
def trained(spec, tmp_path):
    """(base, adapter folder) of a run on a GGUF file."""
    train, valid = save_data(tmp_path)
    settings = {"model": spec, "data": str(train), "validation": str(valid), "output": str(tmp_path / "run")}
    run = lorakit.train(lorakit.TrainConfig.from_dict({**settings, "dtype": "fp32", "learning_rate": 1e-2}))
    assert run.best_loss < run.initial_loss
    return spec, tmp_path / "run"


def test_a_run_on_a_gguf_file(trained, tmp_path):
    _, folder = trained
    config = lorakit.TrainConfig.from_yaml(folder / "run.yaml")
    assert config.quantize == "blocks"
    assert Adapter.load(folder / "best").base.storage == "blocks"
    dense = config.replace(quantize="none", output=str(tmp_path / "dense"))
    lorakit.train(dense)
    ours, theirs = (
        [row.get("loss", row.get("eval_loss")) for row in metrics(each)] for each in (folder, tmp_path / "dense")
    )
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=0)
    (result,) = lorakit.evaluate(data=str(tmp_path / "valid.jsonl"), adapters=[folder / "best"], dtype="fp32")
    torch.testing.assert_close(result.scores["loss"], json.loads((folder / "result.json").read_text())["best_loss"])


def test_merging_writes_what_was_trained(trained, tmp_path):
    spec, folder = trained
    result = merge(adapters=[folder / "best"], output=tmp_path / "merged", dtype="fp32")
    assert (result.how, result.held) == ("streamed", "blocks")
    assert result.proof.passed
    merged = load(str(tmp_path / "merged"))
    model = load(spec)
    lorakit.attach(model, str(folder / "best"))
    ids = torch.arange(8).view(1, 8)
    with torch.no_grad():
        torch.testing.assert_close(merged(ids).logits, model(ids).logits, rtol=1e-4, atol=1e-4)
    assert models.load_tokenizer(str(tmp_path / "merged")).chat_template
    result = merge(adapters=[folder / "best"], output=tmp_path / "half", minimum_survival=0.1, max_kl=1.0)
    assert result.report.dtypes == ("bfloat16",)


def test_the_adapter_of_a_run_goes_to_llama_cpp(trained, tmp_path):
    spec, folder = trained
    file = Adapter.load(folder / "best").save(tmp_path / "a.gguf", "gguf", model=models.load_skeleton(spec))
    names = {tensor.name.rsplit(".", 1)[0] for tensor in gguf.GGUFReader(file).tensors}
    assert names <= {tensor.name for tensor in gguf.GGUFReader(spec).tensors}
    assert len(names) == 14


@pytest.mark.parametrize("quantize", ["int8", "nf4"])
def test_a_merge_of_what_was_trained_on_a_quantised_folder(base_folder, quantize, tmp_path):
    handle, _ = losses(load(base_folder, quantize))
    handle.save("default", tmp_path / "adapter")
    result = merge(
        adapters=[tmp_path / "adapter"], model=base_folder, output=tmp_path / "merged", dtype="fp32", device="cpu"
    )
    assert result.proof.passed
    assert result.held == quantize
    ids = torch.arange(8).view(1, 8)
    with torch.no_grad():
        torch.testing.assert_close(
            load(str(tmp_path / "merged"))(ids).logits, handle.model(ids).logits, rtol=1e-4, atol=1e-4
        )


def test_the_command_line_knows_how_the_base_is_held(base_folder, tmp_path, monkeypatch):
    from click.testing import CliRunner

    train, valid = save_data(tmp_path)
    runner = CliRunner()
    out = str(tmp_path / "run")
    arguments = [
        "train",
        str(train),
        "--valid",
        str(valid),
        "--model",
        base_folder,
        "--output",
        out,
        "--quantize",
        "nf4",
    ]
    result = runner.invoke(cli.main, [*arguments, "--dtype", "fp32", "--json"])
    assert result.exit_code == 0, result.output
    for verb in (
        ["eval", str(valid), "--adapter", f"{out}/best", "--json"],
        ["generate", "--adapter", f"{out}/best", "--prompt", "0: red red?", "--max-new-tokens", "3"],
    ):
        result = runner.invoke(cli.main, [*verb, "--dtype", "fp32"])
        assert result.exit_code == 0, result.output
    result = runner.invoke(cli.main, ["eval", str(valid), "--adapter", f"{out}/best", "--quantize", "none"])
    assert result.exit_code == 2
    assert "in nf4" in result.output
    result = runner.invoke(cli.main, [*arguments[:-1], "blocks", "--output", f"{out}2"])
    assert result.exit_code == 2
    assert "is no GGUF file" in result.output


@pytest.mark.parametrize("quantize", ["none", "int8", "nf4"])
def test_a_plan_knows_how_the_base_is_held(base_folder, quantize):
    config = lorakit.TrainConfig(model=base_folder, data="none", dtype="fp32", device="cpu", quantize=quantize)
    planner = Planner(config, examples())
    model = load(base_folder, quantize)
    held = sum(part.nbytes for part in packed_bytes(model).values()) + sum(b.nbytes for b in model.buffers())
    workspace = 0 if quantize == "none" else models.WORKSPACE
    assert planner.weights == held + workspace


# ---------------------------------------------------------------- the real model


@pytest.mark.real_model
def test_smollm2_in_its_blocks_is_smollm2(smollm2):
    location = models.resolve(smollm2).location
    kept, dense = load(smollm2, "blocks"), load(smollm2)
    assert kept.name_or_path == smollm2
    assert load(location).name_or_path == location
    held = sum(part.nbytes for part in packed_bytes(kept).values())
    assert held < models.Path(location).stat().st_size
    for model in (kept, dense):
        lorakit.attach(model, LoRAConfig(r=2), seed=0)
    batch = collate(examples(), range(6), share=True)
    found = []
    for model in (kept, dense):
        with ready(model, 40):
            loss = cross_entropy_sum(packed_logits(model, batch), batch.targets)
            loss.backward()
        grads = torch.cat([p.grad.flatten() for p in lorakit.adapters(model).trainable_parameters()])
        found.append((loss.detach(), grads))
    torch.testing.assert_close(found[0][0], found[1][0], rtol=1e-5, atol=0)
    torch.testing.assert_close(found[0][1], found[1][1], rtol=1e-3, atol=1e-4)


@pytest.mark.real_model
def test_loading_smollm2_in_its_blocks_takes_its_file_and_no_more(smollm2):
    if not machine.resident_memory():
        pytest.skip("this system does not say what a process holds")
    import subprocess
    import sys

    program = (
        "import lorakit; from lorakit import machine, models; from pathlib import Path;"
        "source = models.resolve('smollm2').location; skeleton = models.load_skeleton(source);"
        "import transformers.modeling_gguf_pytorch_utils, gguf.quants; before = machine.resident_memory();"
        "model = models.load_weights(source, 'fp32', 'cpu');"
        "[p.parts[0].view(-1)[::512].sum() for p in model.parameters() if hasattr(p, 'parts')];"
        "peak = Path('/proc/self/status').read_text().split('VmHWM:')[1].split()[0];"
        "print(before, machine.resident_memory(), int(peak) * 1024)"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    before, after, peak = map(int, done.stdout.split())
    size = models.Path(models.resolve(smollm2).location).stat().st_size
    assert after - before < 1.3 * size
    assert peak - before < 1.5 * size


STEPS = """
import sys
from pathlib import Path
import torch, transformers.modeling_gguf_pytorch_utils, gguf.quants
import lorakit
from lorakit import machine, models
from lorakit.data.batches import collate
from lorakit.data.chat import Example
from lorakit.data.sources import Origin
from lorakit.training.loop import ready
from lorakit.training.objectives import Predictions

source = models.resolve("smollm2").location
models.load_skeleton(source)
before = machine.resident_memory()
model = models.load_weights(source, "fp32", "cpu", "blocks")
handle = lorakit.attach(model, lorakit.LoRAConfig(r=4, delta=sys.argv[1]))
optimizer = torch.optim.AdamW(handle.trainable_parameters())
rows = [Example(list(range(10 * i, 10 * i + 12)), [False] * 8 + [True] * 4, Origin("rows", i)) for i in range(2)]
with ready(model, 16) as share:
    batch = collate(rows, range(2), share=share)
    for _ in range(3):
        Predictions.of(model, batch).loss_sum().backward()
        optimizer.step()
        optimizer.zero_grad()
peak = Path("/proc/self/status").read_text().split("VmHWM:")[1].split()[0]
print(before, int(peak) * 1024, sum(p.numel() for p in model.parameters()))
"""


@pytest.mark.real_model
@pytest.mark.parametrize("delta", ["lora", "dora"])
def test_training_on_blocks_holds_the_file_and_a_bounded_workspace(smollm2, delta):
    if not machine.resident_memory():
        pytest.skip("this system does not say what a process holds")
    import os
    import subprocess
    import sys

    # the C library gives freed blocks back at once, so that what is held is what is used
    held = os.environ | {"MALLOC_MMAP_THRESHOLD_": "1000000", "MALLOC_TRIM_THRESHOLD_": "1000000"}
    done = subprocess.run([sys.executable, "-c", STEPS, delta], capture_output=True, text=True, check=True, env=held)
    before, peak, parameters = map(int, done.stdout.split())
    size = models.Path(models.resolve(smollm2).location).stat().st_size
    of_a_few_tokens = 120 << 20  # adapter, optimiser, activations, what libraries take when they are first called
    assert peak - before < size + models.WORKSPACE + of_a_few_tokens
    assert size + models.WORKSPACE + of_a_few_tokens < 4 * parameters / 2  # half of what the base would take in fp32
