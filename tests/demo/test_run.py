"""The whole demo on a model of two layers: it learns nothing to speak of, and everything around that is real."""

import json

import pytest
from click.testing import CliRunner

from lorakit.adapter.value import Adapter
from lorakit.cli import main
from lorakit.demo.orders import canonical, make_orders
from lorakit.demo.run import ANSWER_TOKENS, demo
from lorakit.errors import ConfigError, ModelError
from lorakit.files import read_json
from lorakit.training.events import Evaluated, StepDone
from tiny_models import byte_tokenizer, tiny_llama


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """A saved Llama of 2 layers with a byte tokenizer and the ChatML template."""
    folder = tmp_path_factory.mktemp("base")
    tiny_llama(context=1024).save_pretrained(folder)
    byte_tokenizer(eos="<|im_end|>").save_pretrained(folder)
    return str(folder)


def test_demo_leaves_rows_adapter_report_and_figures(base, tmp_path):
    events = []
    result = demo(tmp_path / "run", rows=16, test_rows=3, model=base, on_event=events.append)
    folder = tmp_path / "run"
    assert result.rows == {"train": 16, "valid": 4, "test": 3}
    for part, count in result.rows.items():
        lines = (folder / f"{part}.jsonl").read_text().splitlines()
        assert [json.loads(line) for line in lines] == [order.row() for order in make_orders(part, count)]
    assert Adapter.load(folder / "best").nbytes > 0
    assert (folder / "report.html").is_file()
    assert read_json(folder / "demo.json") == json.loads(json.dumps(result.to_dict()))
    assert result.base.exact_match == 0.0  # random weights
    assert len(result.comparisons) == 3
    assert all(pair.base and pair.order for pair in result.comparisons)
    assert sum(isinstance(event, StepDone) for event in events) == 2
    assert any(isinstance(event, Evaluated) for event in events)


def test_command_says_what_to_type_next(base, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    arguments = ["demo", "--rows", "8", "--test-rows", "2", "--model", base, "--json"]
    for folder in ("runs/demo", "runs/demo-2"):
        result = CliRunner().invoke(main, arguments, catch_exceptions=False)
        assert result.exit_code == 0, result.stderr
        assert f"lorakit chat --adapter {folder}/best --system 'Turn the order" in result.stderr
        assert "exact match         0.0%     0.0%" in result.stderr
        told = json.loads(result.stdout.splitlines()[-1])
        assert told["run"]["adapter"] == f"{folder}/best"
        assert told["base"].keys() == {"exact_match", "json_valid"}


def test_without_a_model_the_error_helps_and_nothing_is_written(tmp_path):
    with pytest.raises(ModelError, match="no such folder or file"):
        demo(tmp_path / "run", model=str(tmp_path / "none"))
    with pytest.raises(ConfigError, match="at least one of each"):
        demo(tmp_path / "run", rows=0)
    assert not (tmp_path / "run").exists()


@pytest.mark.real_model
def test_answers_fit_into_the_tokens_they_are_given(smollm2):
    from lorakit.models import load_tokenizer

    tokenizer = load_tokenizer(smollm2)
    longest = max(len(tokenizer(order.answer)["input_ids"]) for order in make_orders("test", 1000))
    assert longest < ANSWER_TOKENS
    assert canonical("{}") == "{}"
