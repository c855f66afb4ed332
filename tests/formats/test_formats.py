"""Telling formats apart."""

import pytest
import torch

import lorakit
from adapter.models import llama, randomise
from lorakit import Adapter, LoRAConfig
from lorakit.adapter.blank import blank_adapter
from lorakit.errors import AdapterFileError
from lorakit.formats import CODECS, BaseFacts, Context, locate, obstacles, recognise
from tiny_models import tiny_llama


@pytest.fixture
def model():
    model = llama().eval()
    randomise(lorakit.attach(model, LoRAConfig(r=4)))
    return model


@pytest.mark.parametrize("format", ["peft", "gguf", "vllm", "loralib"])
def test_what_was_saved_to_a_folder_is_read_from_that_folder(format, model, tmp_path):
    value = lorakit.adapters(model).extract()
    written = value.save(tmp_path / "a", format, model=model)
    for path in (tmp_path / "a", written):
        again = Adapter.load(path, model=model, alpha=value.config.alpha if format == "loralib" else None)
        for name in value.factors:
            assert torch.allclose(again.delta(name), value.delta(name), atol=1e-6)


def test_a_folder_of_several_adapters_is_not_guessed_at(model, tmp_path):
    value = lorakit.adapters(model).extract()
    for name in ("one", "two"):
        value.save(tmp_path / f"{name}.gguf", "gguf", model=model)
    with pytest.raises(AdapterFileError, match=r"holds several adapters; name one of one\.gguf, two\.gguf"):
        recognise(tmp_path)
    (tmp_path / "two.gguf").unlink()
    assert locate(tmp_path) == (tmp_path / "one.gguf", "gguf")


def test_what_is_no_adapter_says_so(tmp_path):
    (tmp_path / "notes.txt").write_text("hello")
    with pytest.raises(AdapterFileError, match="not an adapter in any format"):
        recognise(tmp_path / "notes.txt")
    with pytest.raises(AdapterFileError, match="not an adapter folder"):
        Adapter.load(tmp_path)
    with pytest.raises(AdapterFileError, match=r"did you mean .*notes\.txt"):
        recognise(tmp_path / "note.txt")


@pytest.mark.parametrize("format", ["peft", "gguf", "loralib"])
def test_an_adapter_is_not_written_for_a_base_of_other_sizes(format, model, tmp_path):
    value = lorakit.adapters(model).extract()
    other = tiny_llama(vocabulary=97, hidden_size=64)
    with pytest.raises(AdapterFileError, match=r"an update of \d+ x \d+, and the base has"):
        value.save(tmp_path / "a", format, model=other)
    assert not (tmp_path / "a").exists()


@pytest.mark.parametrize("format", CODECS)
def test_biases_of_updates_are_carried_by_peft_and_refused_by_name_by_all_others(format, tmp_path):
    model, config = llama().eval(), LoRAConfig(r=4, lora_bias=True)
    context = Context(base=BaseFacts.of(model), base_reference="base")
    blank = blank_adapter(model, config)
    handle = lorakit.attach(model, config)
    randomise(handle)
    told = [obstacles(value, format, context) for value in (handle.extract(), blank)]
    assert told[0] == told[1]
    named = {problem.partition(":")[0] for problem in told[0] if "B has a bias (lora_bias)" in problem}
    assert named == (set() if format == "peft" else set(blank.factors))
    if format != "peft":
        with pytest.raises(AdapterFileError, match=r"up_proj: B has a bias \(lora_bias\), which"):
            handle.extract().save(tmp_path / "a", format, model=model)
        assert not (tmp_path / "a").exists()
