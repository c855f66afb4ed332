"""The folder for `ollama create`."""

import pytest
import torch

import lorakit
from adapter.models import randomise
from lorakit import Adapter, LoRAConfig
from lorakit.errors import AdapterFileError
from lorakit.formats import BaseFacts, Context, load_adapter, obstacles, recognise, save_adapter
from tiny_models import tiny_llama


@pytest.fixture
def model():
    return tiny_llama()


@pytest.fixture
def adapter(model):
    handle = lorakit.attach(model, LoRAConfig(r=4, alpha=6.0))
    randomise(handle)
    value = handle.extract()
    handle.detach()
    return value


def test_the_modelfile_names_base_and_adapter_and_nothing_else(model, adapter, tmp_path):
    context = Context(base=BaseFacts.of(model), base_reference="llama3.2")
    folder = save_adapter(adapter, tmp_path / "out", format="ollama", context=context)
    assert (folder / "Modelfile").read_text() == "FROM llama3.2\nADAPTER ./adapter.gguf\n"
    assert sorted(p.name for p in folder.iterdir()) == ["Modelfile", "adapter.gguf"]
    assert recognise(folder) == recognise(folder / "Modelfile") == "ollama"
    again = load_adapter(folder, context=context)
    for path in adapter.factors:
        torch.testing.assert_close(again.delta(path), adapter.delta(path))


def test_a_base_that_lies_here_is_named_by_its_place(model, tmp_path):
    model.name_or_path = str(tmp_path / "base.gguf")
    handle = lorakit.attach(model, LoRAConfig(r=4))
    folder = handle.extract().save(tmp_path / "out", "ollama", model=model)
    assert (folder / "Modelfile").read_text().startswith(f"FROM {tmp_path}/base.gguf\n")


@pytest.mark.parametrize(
    ("reference", "message"), [(None, "Ollama's name for the base"), ("a\nSYSTEM evil", "no line of a Modelfile")]
)
def test_a_base_without_a_name_for_ollama_is_an_obstacle(model, adapter, reference, message, tmp_path):
    context = Context(base=BaseFacts.of(model), base_reference=reference)
    assert len(obstacles(adapter, "ollama", context)) == 1
    with pytest.raises(AdapterFileError, match=message):
        save_adapter(adapter, tmp_path / "out", format="ollama", context=context)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("FROM x\nADAPTER ./a.gguf\nADAPTER b.gguf\n", "names 2 adapters"),
        ("FROM x\nadapter ./gone.gguf\n", "no GGUF file"),
    ],
)
def test_a_modelfile_that_cannot_be_followed(text, message, model, tmp_path):
    (tmp_path / "Modelfile").write_text(text)
    with pytest.raises(AdapterFileError, match=message):
        Adapter.load(tmp_path, model=model)
    (tmp_path / "Modelfile").write_text("FROM x\n")
    with pytest.raises(AdapterFileError, match=r"adapter_config\.json"):
        Adapter.load(tmp_path, model=model)
