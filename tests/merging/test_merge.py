"""A merged model on disk is the adapter: over architectures, shards, ties, dtypes; and what is refused."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

import lorakit
from adapter.models import mixtral, qwen3_moe, randomise
from lorakit import LoRAConfig, files, models
from lorakit.checkpoints.folder import NotStreamableError, find_checkpoint
from lorakit.data.sources import Origin, Row
from lorakit.errors import AdapterError, ConfigError, MergeError, ModelError
from lorakit.merging import CERTIFICATE, merge, proof
from tiny_models import byte_tokenizer, tiny_gpt2, tiny_llama

IDS = torch.randint(0, 200, (2, 7), generator=torch.Generator().manual_seed(0))


def saved(folder: Path, model, **options) -> str:
    model.save_pretrained(folder, **options)
    byte_tokenizer().save_pretrained(folder)
    return str(folder)


def adapter_for(base: str, folder: Path, seed: int = 0, size: float = 0.2, **config) -> Path:
    """A random adapter saved by lorakit, and nothing else."""
    model, _ = lorakit.load_model(base, "fp32")
    handle = lorakit.attach(model, LoRAConfig(**{"r": 4, **config}), seed=seed)
    randomise(handle, size=size)
    return handle.save("default", folder)


def adapted(base: str, *adapters, dtype: str = "fp32"):
    model, _ = lorakit.load_model(base, dtype)
    handle = lorakit.attach(model, adapters[0][0], name="0")
    for i, (path, _) in enumerate(adapters[1:], 1):
        handle.load(path, str(i))
    handle.activate({str(i): weight for i, (_, weight) in enumerate(adapters)})
    return model


def logits(model) -> torch.Tensor:
    with torch.no_grad():
        return model(IDS).logits


def reloaded(folder: Path):
    return AutoModelForCausalLM.from_pretrained(folder, local_files_only=True)


CASES = {
    "llama": (lambda: tiny_llama(), {}),
    "llama, untied": (lambda: tiny_llama(tie_word_embeddings=False), {"target_modules": ["q_proj", "lm_head"]}),
    "llama, biases": (lambda: tiny_llama(attention_bias=True), {"bias": "all"}),
    "llama, tied embedding adapted": (lambda: tiny_llama(), {"target_modules": ["embed_tokens", "v_proj"]}),
    "llama, tied head adapted": (lambda: tiny_llama(), {"target_modules": ["lm_head", "v_proj"]}),
    "llama, head trained whole": (lambda: tiny_llama(), {"modules_to_save": ("lm_head",)}),
    "llama, norm trained whole": (lambda: tiny_llama(), {"modules_to_save": ("model.norm",), "scaling": "rslora"}),
    "gpt2": (lambda: tiny_gpt2(), {"rank_pattern": {"c_attn": 2}, "alpha_pattern": {"c_fc": 3.0}}),
    "gpt2, biases of B": (lambda: tiny_gpt2(), {"lora_bias": True}),
    "gpt2, bare names": (lambda: tiny_gpt2().transformer, {"bias": "lora_only"}),
}


@pytest.mark.parametrize("shard_size", ["1GB", "20KB"])
@pytest.mark.parametrize(("build", "config"), CASES.values(), ids=CASES)
def test_the_merged_folder_is_the_adapter(build, config, shard_size, tmp_path):
    base = saved(tmp_path / "base", build(), max_shard_size=shard_size)
    adapter = adapter_for(base, tmp_path / "adapter", **config)
    before = {file.name: file.read_bytes() for file in Path(base).iterdir()}
    result = merge(adapters=[adapter], output=tmp_path / "merged")
    assert result.how == "streamed"
    assert result.proof.passed
    assert result.proof.merged.same_top > 0.99
    assert result.report.survived == pytest.approx(1.0, abs=1e-4)
    assert torch.allclose(logits(reloaded(tmp_path / "merged")), logits(adapted(base, (adapter, 1.0))), atol=2e-4)
    assert {file.name: file.read_bytes() for file in Path(base).iterdir()} == before
    names = {file.name for file in (tmp_path / "merged").iterdir()}
    assert {CERTIFICATE, *(name for name in before if not name.endswith(".safetensors"))} <= names
    if shard_size == "20KB":
        assert len([name for name in names if name.startswith("model-")]) > 1
        index = json.loads((tmp_path / "merged/model.safetensors.index.json").read_text())
        held = {
            key: file
            for file in names
            if file.endswith(".safetensors")
            for key in load_file(tmp_path / "merged" / file)
        }
        assert index["weight_map"] == held


def test_streaming_gives_what_merging_in_memory_gives(tmp_path):
    base = saved(tmp_path / "base", tiny_llama(), max_shard_size="20KB")
    adapter = adapter_for(base, tmp_path / "adapter")
    for rounding in ("nearest", "stochastic"):
        out = tmp_path / rounding
        merge(adapters=[adapter], output=out, dtype="bf16", rounding=rounding, seed=5, minimum_survival=0.1, max_kl=9)
        model, _ = lorakit.load_model(base, "fp32")
        handle = lorakit.attach(model, adapter)
        streamed = reloaded(out).state_dict()
        if rounding == "nearest":
            expected = handle.merge().to(torch.bfloat16).state_dict()
            assert all(torch.equal(streamed[name], expected[name]) for name in expected)
        again = tmp_path / f"{rounding} again"
        merge(adapters=[adapter], output=again, dtype="bf16", rounding=rounding, seed=5, verify=False)
        assert all(torch.equal(tensor, streamed[name]) for name, tensor in reloaded(again).state_dict().items())


def test_a_bias_of_b_in_a_layer_without_bias_is_refused_before_anything_is_written(tmp_path):
    base = saved(tmp_path / "base", tiny_llama(attention_bias=True))
    adapter = adapter_for(base, tmp_path / "adapter", lora_bias=True, target_modules=["q_proj", "up_proj"])
    with pytest.raises(AdapterError, match=r"(?s)cannot be merged: .*lora_bias.*layers\.0\.mlp\.up_proj\n") as caught:
        merge(adapters=[adapter], output=tmp_path / "merged")
    assert "q_proj" not in str(caught.value)
    assert not (tmp_path / "merged").exists()


def test_several_adapters_with_weights_add_up(tmp_path):
    base = saved(tmp_path / "base", tiny_llama())
    first = adapter_for(base, tmp_path / "first")
    second = adapter_for(base, tmp_path / "second", seed=1, r=2, target_modules=["q_proj", "embed_tokens"])
    merge(adapters=[first, second], weights=[0.7, -0.3], output=tmp_path / "merged")
    expected = logits(adapted(base, (first, 0.7), (second, -0.3)))
    assert torch.allclose(logits(reloaded(tmp_path / "merged")), expected, atol=2e-4)
    certificate = json.loads((tmp_path / "merged" / CERTIFICATE).read_text())
    assert [entry["weight"] for entry in certificate["adapters"]] == [0.7, -0.3]
    assert certificate["proof"]["passed"] is True
    assert {layer["name"] for layer in certificate["layers"]} >= {"model.embed_tokens.weight"}


EXPERTS = ("experts.gate_up_proj", "experts.down_proj")


@pytest.mark.parametrize("shard_size", ["1GB", "20KB"])
@pytest.mark.parametrize(("build", "stored"), [(qwen3_moe, "mlp"), (mixtral, "block_sparse_moe")])
def test_experts_stored_apart_are_streamed(build, stored, shard_size, tmp_path):
    """Gathered into the stack that the model has, folded, and written apart under the names they had; a small shard
    ends within a layer.
    """
    base = saved(tmp_path / "base", build(vocab_size=272), max_shard_size=shard_size)
    adapter = adapter_for(base, tmp_path / "adapter", target_parameters=EXPERTS, target_modules=["q_proj"])
    out = tmp_path / "merged"
    result = merge(adapters=[adapter], output=out)
    assert result.how == "streamed"
    assert result.report.survived == pytest.approx(1.0, abs=1e-4)
    assert len(result.report.layers) == 6
    headers = [
        {file.name: files.read_safetensors_header(file)[0] for file in Path(folder).glob("*.safetensors")}
        for folder in (base, out)
    ]
    assert headers[0] == headers[1]
    assert any(f"layers.0.{stored}.experts.3." in key for shard in headers[1].values() for key in shard)
    model, _ = lorakit.load_model(base, "fp32")
    expected = lorakit.attach(model, adapter).merge().state_dict()
    assert all(torch.equal(tensor, expected[name]) for name, tensor in reloaded(out).state_dict().items())


def test_a_router_stored_under_another_name_is_written_under_it(tmp_path):
    base = saved(tmp_path / "base", mixtral(vocab_size=272))
    adapter = adapter_for(base, tmp_path / "adapter", target_modules=["q_proj"], modules_to_save=("mlp.gate",))
    assert merge(adapters=[adapter], output=tmp_path / "merged").how == "streamed"
    assert torch.allclose(logits(reloaded(tmp_path / "merged")), logits(adapted(base, (adapter, 1.0))), atol=2e-4)
    keys = load_file(tmp_path / "merged/model.safetensors").keys()
    assert keys == load_file(tmp_path / "base/model.safetensors").keys()


def test_a_base_with_an_expert_missing_is_not_streamed(tmp_path):
    base = saved(tmp_path / "base", mixtral(vocab_size=272))
    weights = load_file(tmp_path / "base/model.safetensors")
    del weights["model.layers.1.block_sparse_moe.experts.2.w2.weight"]
    save_file(weights, tmp_path / "base/model.safetensors")
    with pytest.raises(NotStreamableError, match=r"model\.layers\.1\.mlp\.experts\.down_proj"):
        find_checkpoint(tmp_path / "base", models.load_skeleton(base))


def test_a_base_whose_files_have_other_names_is_merged_in_memory(tmp_path):
    base = saved(tmp_path / "base", tiny_llama())
    weights = load_file(tmp_path / "base/model.safetensors")
    (tmp_path / "base/model.safetensors").unlink()
    torch.save(weights, tmp_path / "base/pytorch_model.bin")
    adapter = adapter_for(base, tmp_path / "adapter")
    result = merge(adapters=[adapter], output=tmp_path / "merged")
    assert result.how.startswith("in memory: ")
    assert "no model.safetensors" in result.how
    assert torch.allclose(logits(reloaded(tmp_path / "merged")), logits(adapted(base, (adapter, 1.0))), atol=2e-4)


def test_on_data_both_models_are_measured(tmp_path):
    base = saved(tmp_path / "base", tiny_llama())
    adapter = adapter_for(base, tmp_path / "adapter")
    rows = [Row(Origin("data", i), {"prompt": f"say hi {i}", "completion": "hi"}) for i in range(6)]
    result = merge(
        adapters=[adapter], output=tmp_path / "m", data=rows, metrics=("loss", "exact_match"), max_new_tokens=4
    )
    with_adapter, merged = result.scores["loss"]
    assert merged == pytest.approx(with_adapter, rel=1e-4)
    assert set(result.scores) == {"loss", "exact_match"}
    assert result.proof.rows == 6


def test_a_merge_that_loses_the_update_is_refused_and_leaves_nothing(tmp_path):
    base = saved(tmp_path / "base", tiny_llama().to(torch.bfloat16))
    adapter = adapter_for(base, tmp_path / "adapter", size=2e-4)
    with pytest.raises(MergeError, match=r"(?s)would survive rounding to bfloat16.*stochastically"):
        merge(adapters=[adapter], output=tmp_path / "merged", dtype="bf16")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["adapter", "base"]
    result = merge(adapters=[adapter], output=tmp_path / "merged", dtype="bf16", accept=True)
    assert result.accepted
    assert json.loads((tmp_path / "merged" / CERTIFICATE).read_text())["accepted_without_passing"] is True


def test_a_merged_model_that_differs_is_refused_and_leaves_nothing(tmp_path, monkeypatch):
    base = saved(tmp_path / "base", tiny_llama())
    adapter = adapter_for(base, tmp_path / "adapter")
    real = proof.compare

    def damaged(reference, merged, max_kl):
        with torch.no_grad():
            merged.model.layers[1].mlp.up_proj.weight.mul_(1.5)  # as if a shard had been written wrongly
        return real(reference, merged, max_kl)

    monkeypatch.setattr(proof, "compare", damaged)
    with pytest.raises(MergeError, match=r"differs from the adapter: mean KL .* Nothing was written"):
        merge(adapters=[adapter], output=tmp_path / "merged")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["adapter", "base"]
    result = merge(adapters=[adapter], output=tmp_path / "merged", accept=True)
    assert result.accepted
    assert not result.proof.passed


def test_a_divergence_as_large_as_the_adapters_own_does_not_pass(tmp_path):
    """What is small for one adapter is all there is to another: a tenth of the distance from the base is the limit."""
    base = saved(tmp_path / "base", tiny_llama())
    adapter = adapter_for(base, tmp_path / "adapter")
    with pytest.raises(MergeError, match="differs from the adapter"):
        merge(adapters=[adapter], weights=[1e-4], output=tmp_path / "merged", dtype="bf16", minimum_survival=0)
    result = merge(adapters=[adapter], weights=[1e-4], output=tmp_path / "merged")
    assert result.proof.limit <= 1.0001 * max(result.proof.base.mean_kl / 10, 10 * result.proof.floor.mean_kl)
    assert result.report.survived <= 1


def test_verifying_that_would_not_fit_into_memory_is_refused(tmp_path, monkeypatch):
    base = saved(tmp_path / "base", tiny_llama())
    adapter = adapter_for(base, tmp_path / "adapter")
    monkeypatch.setattr("lorakit.machine.available_memory", lambda: 1000)
    with pytest.raises(MergeError, match=r"--no-verify"):
        merge(adapters=[adapter], output=tmp_path / "merged")
    result = merge(adapters=[adapter], output=tmp_path / "merged", verify=False)
    assert result.proof is None


@pytest.mark.parametrize("how", ["streamed", "in memory"])
def test_a_base_without_tokenizer_is_merged_but_not_verified(how, tmp_path):
    base = saved(tmp_path / "base", tiny_llama())
    adapter = adapter_for(base, tmp_path / "adapter")
    expected = logits(adapted(base, (adapter, 1.0)))
    for file in (tmp_path / "base").iterdir():
        if file.name not in ("config.json", "generation_config.json", "model.safetensors"):
            file.unlink()
    if how == "in memory":
        torch.save(load_file(tmp_path / "base/model.safetensors"), tmp_path / "base/pytorch_model.bin")
        (tmp_path / "base/model.safetensors").unlink()
    with pytest.raises(ModelError, match=r"holds no tokenizer .*verifying needs one.* --no-verify"):
        merge(adapters=[adapter], output=tmp_path / "merged")
    assert not (tmp_path / "merged").exists()
    result = merge(adapters=[adapter], output=tmp_path / "merged", verify=False)
    assert result.how.startswith(how)
    assert not result.tokenizer
    assert torch.allclose(logits(reloaded(tmp_path / "merged")), expected, atol=2e-4)
    byte_tokenizer().save_pretrained(adapter)  # the adapter's own does as well
    result = merge(adapters=[adapter], output=tmp_path / "verified")
    assert result.tokenizer
    assert result.proof.passed


def test_wrong_input(tmp_path):
    base = saved(tmp_path / "base", tiny_llama())
    adapter = adapter_for(base, tmp_path / "adapter")
    other = saved(tmp_path / "other", tiny_llama(seed=1))
    (tmp_path / "full").mkdir()
    (tmp_path / "full/file").touch()
    out = {"adapters": [adapter], "output": tmp_path / "merged"}
    for error, match, changes in [
        (ConfigError, "output: .* exists", {"output": tmp_path / "full"}),
        (ConfigError, "weights: 2 for 1", {"weights": [1, 2]}),
        (ConfigError, "at least one", {"adapters": []}),
        (ConfigError, "not all of them 0", {"weights": [0.0]}),
        (ConfigError, "max_kl: nats a token", {"max_kl": -1.0}),
        (ConfigError, "nearest or stochastic", {"rounding": "up"}),
        (ConfigError, "dtype", {"dtype": "int3"}),
        (AdapterError, "not made on this base", {"model": other}),
        (ModelError, "no such folder", {"model": str(tmp_path / "nowhere")}),
    ]:
        with pytest.raises(error, match=match):
            merge(**out | changes)
        assert not (tmp_path / "merged").exists()


def large_llama():
    return tiny_llama(vocabulary=2048, hidden_size=512, intermediate_size=2048, num_hidden_layers=24)


def large_mixtral():
    return mixtral(vocab_size=2048, hidden_size=512, intermediate_size=512, num_hidden_layers=14, num_local_experts=4)


@pytest.mark.parametrize(
    ("build", "config"), [(large_llama, {}), (large_mixtral, {"target_parameters": EXPERTS, "target_modules": ()})]
)
def test_no_more_than_a_shard_is_in_memory(build, config, tmp_path):
    """Peak memory over the process's own before: about the largest tensor's fp32 copies (a layer's experts are one) and
    one mapped shard.
    """
    torch.manual_seed(0)
    model = build()
    base = saved(tmp_path / "base", model, max_shard_size="32MB")
    adapter = adapter_for(base, tmp_path / "adapter", size=0.02, **config)
    del model
    shards = [file.stat().st_size for file in (tmp_path / "base").glob("*.safetensors")]
    assert sum(shards) > 200e6
    script = f"""
import resource
from lorakit.merging import merge
from lorakit import models
models.load_skeleton({base!r})
peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
before = peak()
merge(adapters=[{str(adapter)!r}], output={str(tmp_path / "merged")!r}, verify=False)
print(peak() - before)
"""
    out = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    grown = int(out.stdout.split()[-1])
    assert grown < max(shards) + 80e6, f"{grown / 1e6:.0f} MB"
