"""GGUF files: what they store is what is loaded, converted once, safely."""

import logging
import os
import shutil
import subprocess
import sys

import gguf
import pytest
import torch

from gguf_files import rounded, write_gguf
from lorakit import files, gguf_cache, models
from lorakit.errors import FileError, ModelError
from tiny_models import CHATML, byte_tokenizer, tiny_llama


@pytest.fixture
def cache(monkeypatch, tmp_path):
    monkeypatch.setenv("LORAKIT_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.mark.parametrize("store", ["F32", "F16", "Q8_0"])
def test_gguf_loads_exactly_what_it_stores(store, tmp_path, cache):
    store = gguf.GGMLQuantizationType[store]
    original = tiny_llama(vocabulary=len(byte_tokenizer()))
    spec = write_gguf(tmp_path / "tiny.gguf", original, store)
    model, tokenizer = models.load_model(spec, dtype="fp32", device="cpu")
    expected = {name: rounded(p.data, store) for name, p in original.named_parameters()}
    assert expected.keys() == dict(model.named_parameters()).keys()
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, expected[name]), name
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert model.name_or_path == spec
    assert tokenizer.chat_template == CHATML
    text = "<|im_start|>user\nhi  you\n<|im_end|>"
    assert tokenizer.decode(tokenizer.encode(text)) == text
    assert models.stop_ids(model, tokenizer) == {tokenizer.convert_tokens_to_ids("<|im_end|>")}


def test_gguf_is_converted_once_and_found_again_by_its_content(tmp_path, cache, caplog):
    caplog.set_level(logging.INFO, "lorakit.gguf_cache")
    path = tmp_path / "tiny.gguf"
    model = tiny_llama(vocabulary=len(byte_tokenizer()))
    write_gguf(path, model)
    first = gguf_cache.converted_gguf(path)
    assert gguf_cache.converted_gguf(shutil.copy(path, tmp_path / "renamed.gguf")) == first
    assert len(caplog.records) == 1
    files.verify_folder(first)
    assert str(tmp_path) not in "".join(p.read_text() for p in first.glob("*.json"))  # moves with its folder
    write_gguf(path, tiny_llama(vocabulary=len(byte_tokenizer()), seed=1))
    assert gguf_cache.converted_gguf(path) != first
    assert len(caplog.records) == 2


def test_damaged_conversion_is_made_again(tmp_path, cache, caplog):
    caplog.set_level(logging.INFO, "lorakit.gguf_cache")
    path = write_gguf(tmp_path / "tiny.gguf", tiny_llama(vocabulary=len(byte_tokenizer())))
    folder = gguf_cache.converted_gguf(path)
    with (folder / "model.safetensors").open("r+b") as file:
        file.truncate(1000)
    assert gguf_cache.converted_gguf(path) == folder
    files.verify_folder(folder)
    assert len(caplog.records) == 2


def test_two_processes_convert_once(tmp_path, cache):
    path = write_gguf(tmp_path / "tiny.gguf", tiny_llama(vocabulary=len(byte_tokenizer())))
    program = (
        "import logging, sys; logging.basicConfig(level=logging.INFO, stream=sys.stdout, format='%(message)s');"
        "from lorakit import gguf_cache; print('folder', gguf_cache.converted_gguf(sys.argv[1]))"
    )
    command = [sys.executable, "-W", "error::UserWarning:lorakit", "-c", program, path]
    started = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=os.environ.copy()) for _ in range(2)]
    output = "".join(process.communicate(timeout=120)[0] for process in started)
    assert [process.returncode for process in started] == [0, 0]
    assert output.count("converting") == 1
    assert len({line for line in output.split("\n") if line.startswith("folder")}) == 1
    files.verify_folder(gguf_cache.converted_gguf(path))


def test_what_is_no_gguf_is_an_error_and_leaves_nothing_behind(tmp_path, cache):
    path = tmp_path / "bad.gguf"
    path.write_bytes(b"GGUF" + bytes(100))
    with pytest.raises(ModelError, match=r"bad\.gguf: GGUF version 0"):
        models.load_model(str(path), dtype="fp32", device="cpu")
    assert not cache.exists()
    with pytest.raises(ModelError, match=r"bad\.gguf: transformers cannot read"):
        models.load_model(str(path), dtype="fp32", device="cpu", quantize="none")
    assert [p.suffix for p in (cache / "gguf").iterdir()] == [".lock"]


def test_cache_that_cannot_be_written_says_how_to_choose_another(tmp_path, monkeypatch):
    path = write_gguf(tmp_path / "tiny.gguf", tiny_llama(vocabulary=len(byte_tokenizer())))
    (tmp_path / "file").write_bytes(b"")
    monkeypatch.setenv("LORAKIT_CACHE", str(tmp_path / "file" / "cache"))
    with pytest.raises(FileError, match="LORAKIT_CACHE"):
        gguf_cache.converted_gguf(path)
