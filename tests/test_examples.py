import importlib.util
import re
import sys

import pytest

from conftest import ROOT
from tiny_models import byte_tokenizer, tiny_llama


@pytest.fixture
def quickstart():
    spec = importlib.util.spec_from_file_location("quickstart", ROOT / "examples" / "quickstart.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    yield module
    sys.modules.pop("quickstart", None)


def test_an_adapter_on_any_module(quickstart, capsys):
    quickstart.adapt_any_module()  # asserts for itself that the base comes back
    before, after = map(float, re.search(r"error ([\d.]+) -> ([\d.]+)", capsys.readouterr().out).groups())
    assert after < before / 2


def test_training_and_asking(quickstart, tmp_path, capsys):
    tiny_llama().save_pretrained(tmp_path / "base")
    byte_tokenizer(eos="<|im_end|>").save_pretrained(tmp_path / "base")
    quickstart.train_and_ask(str(tmp_path / "base"), tmp_path)
    output = capsys.readouterr().out
    before, after = map(float, re.search(r"loss ([\d.]+) -> ([\d.]+)", output).groups())
    assert after < before
    assert "base: " in output
    assert "adapter: " in output
