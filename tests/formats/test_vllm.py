"""The folder vLLM reads, by vLLM's own rules for the scale, and by PEFT."""

import json

import peft
import pytest
import torch
from safetensors.torch import load_file

import lorakit
from adapter import models
from adapter.models import CASES
from lorakit import Adapter, LoRAConfig
from lorakit.errors import AdapterFileError
from lorakit.formats import Context, obstacles, recognise, save_adapter
from tiny_models import tiny_llama


def trained(model, **settings):
    return models.trained(model, LoRAConfig(**{"r": 4, "alpha": 6.0, **settings}))


def as_vllm_reads(folder):
    """{module: dense update}: one r and one alpha for all, patterns passed over, `base_model.model.` stripped."""
    values = json.loads((folder / "adapter_config.json").read_text())
    assert not values["modules_to_save"]
    assert not values["use_dora"]
    assert values["bias"] == "none"
    scale = values["lora_alpha"] / (values["r"] ** 0.5 if values["use_rslora"] else values["r"])
    tensors, deltas = load_file(folder / "adapter_model.safetensors"), {}
    for name in tensors:
        *module, end = name.removeprefix("base_model.model.").split(".")
        if (module[-1], end) == ("lora_A", "weight"):
            path, B = ".".join(module[:-1]), tensors[name.replace("lora_A", "lora_B")]
            deltas[path] = scale * B @ tensors[name]
        elif end == "lora_embedding_A":
            deltas[".".join(module)] = scale * (tensors[name.replace("_A", "_B")] @ tensors[name]).T
        else:
            assert (module[-1], end) == ("lora_B", "weight") or end == "lora_embedding_B"
        if "embedding" not in end:
            assert tensors[name].shape[0 if "lora_A" in name else 1] == values["r"]
    return deltas


@pytest.mark.filterwarnings("ignore::FutureWarning")  # PEFT asks transformers for a name that is on its way out
@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"scaling": "rslora"},
        {"rank_pattern": {"up_proj": 7, "q_proj": 1}, "alpha_pattern": {"down_proj": 2.5}},
        {"target_modules": ["embed_tokens", "lm_head", "q_proj"], "rank_pattern": {"embed_tokens": 3}},
    ],
)
def test_vllm_and_peft_read_the_scale_of_every_layer(settings, tmp_path):
    model = tiny_llama(tie_word_embeddings=False)
    adapter = trained(model, **settings)
    folder = adapter.save(tmp_path / "sql", "vllm")
    deltas = as_vllm_reads(folder)
    assert deltas.keys() == adapter.factors.keys()
    for path, delta in deltas.items():
        torch.testing.assert_close(delta, adapter.delta(path))
    assert recognise(folder) == "peft"
    ids = torch.arange(10)[None]
    theirs = peft.PeftModel.from_pretrained(tiny_llama(tie_word_embeddings=False), folder).eval()
    handle = lorakit.attach(model, Adapter.load(folder, format="vllm"))
    torch.testing.assert_close(theirs(ids).logits, model(ids).logits, rtol=1e-4, atol=1e-4)
    handle.detach()
    lorakit.attach(model, adapter)
    torch.testing.assert_close(theirs(ids).logits, model(ids).logits, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("r", "limit"), [(1, 8), (8, 8), (9, 16), (300, 320), (512, 512)])
def test_the_command_serves_it_under_the_name_of_its_folder(r, limit, tmp_path):
    model = tiny_llama()
    model.name_or_path = "org/base model"
    adapter = trained(model, r=r, target_modules=["q_proj"])
    folder = adapter.save(tmp_path / "my sql", "vllm")
    assert (folder / "vllm-serve.txt").read_text() == (
        f"vllm serve 'org/base model' --enable-lora --lora-modules 'my sql={folder}' --max-lora-rank {limit}\n"
    )
    save_adapter(adapter, folder, format="vllm", context=Context(base_reference="here"))
    assert (folder / "vllm-serve.txt").read_text().startswith("vllm serve here --enable-lora")


@pytest.mark.parametrize(
    ("case", "settings", "expected"),
    [
        ("llama", {"modules_to_save": ("lm_head",)}, ["lm_head.weight: trained whole"]),
        ("mlp", {"bias": "lora_only"}, ["first: a trained bias"]),
        ("mlp", {"r": 513}, ["first: rank 513", "second: rank 513"]),
        ("convolutions", {"target_modules": ["two"]}, ["two: a convolution"]),
        ("embedding", {"target_modules": ["table"]}, ["table: vLLM adapts no embedding but"]),
    ],
)
def test_what_vllm_refuses_is_an_obstacle_by_name(case, settings, expected, tmp_path):
    adapter = trained(CASES[case].build(), **settings)
    found = obstacles(adapter, "vllm")
    assert len(found) == len(expected)
    assert all(problem.startswith(start) for problem, start in zip(found, expected, strict=True))
    with pytest.raises(AdapterFileError, match=expected[0]):
        adapter.save(tmp_path / "out", "vllm")
    assert not (tmp_path / "out").exists()
