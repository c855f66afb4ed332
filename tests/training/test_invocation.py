"""Runs of activated adapters: the invocation as text, what of the rows it reaches, and the fast ways."""

import json

import pytest
from click.testing import CliRunner

from lorakit.adapter.attach import attach
from lorakit.adapter.value import Adapter
from lorakit.cli import main
from lorakit.data.chat import Example
from lorakit.data.sources import Origin
from lorakit.errors import ConfigError
from lorakit.models import load_model
from lorakit.training.config import TrainConfig
from lorakit.training.events import DataReady
from lorakit.training.invocation import invocation_line
from lorakit.training.objectives import mean_loss
from lorakit.training.plan_run import plan_run
from lorakit.training.run import read, train
from tiny_models import byte_tokenizer
from tiny_runs import StopAt, assert_same_run, configured

TURN = "<|im_start|>assistant\n"


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"gradient_checkpointing": "on"},
        {"lora": {"r": 4, "layers": [1]}, "cache_trunk": "memory"},
        {"lora": {"r": 4, "init": "pissa", "target_modules": "attention"}},
        {"dtype": "bf16", "quantize": "nf4"},
        {"frozen_products": "int8"},
    ],
    ids=str,
)
def test_a_run_is_resumed_and_read_back(settings, tmp_path, changes):
    changed = {**settings, "lora": {"r": 4}, **changes, "invocation": TURN}
    told = []
    run = train(configured(changed, tmp_path / "straight"), told.append)
    assert run.best_loss < run.initial_loss
    tokens = byte_tokenizer(eos="<|im_end|>").encode(TURN, add_special_tokens=False)
    line = next(event for event in told if isinstance(event, DataReady)).lines[-1]
    assert line == f"alora  invoked by {TURN!r} (tokens {', '.join(map(str, tokens))}) in 40 of 40 rows"
    train(configured(changed, tmp_path / "broken"), StopAt(5))
    train(TrainConfig.from_yaml(tmp_path / "broken" / "run.yaml").replace(resume=True))
    assert_same_run(tmp_path / "straight", tmp_path / "broken")
    best = Adapter.load(tmp_path / "straight" / "best")
    assert best.config.alora_invocation_tokens == tuple(tokens)
    model, _ = load_model(settings["model"], run.dtype, "cpu", run.storage)
    attach(model, best)
    config = configured(changed, tmp_path / "x")
    loss, _ = mean_loss(model, read(config).valid.examples, micro_batch_tokens=config.micro_batch_tokens)
    assert loss == pytest.approx(run.best_loss, rel=1e-2 if run.dtype == "bf16" else 1e-5)


def test_says_what_of_the_rows_is_not_after_it():
    origin = Origin("rows", 1)
    rows = [
        Example([1, 7, 8, 2, 3], [False, False, False, True, True], origin),
        Example([1, 2, 3, 7, 8, 4], [False, True, True, False, False, True], origin),
        Example([1, 2, 3], [False, False, True], origin),
    ]
    line = invocation_line((7, 8), byte_tokenizer(), rows)
    assert line.endswith("in 2 of 3 rows; 50.0% of trained tokens are not after it: base alone")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"invocation": "never in any row"}, r"is in 0 of 40 training rows, and before a trained token in none"),
        ({"invocation": ""}, "makes no token of ''"),
        ({"invocation": "x", "lora": {"alora_invocation_tokens": [1]}}, "leave one of them out"),
    ],
    ids=str,
)
def test_refuses_what_would_train_nothing(settings, tmp_path, changes, message):
    with pytest.raises(ConfigError, match=message):
        train(configured({**settings, **changes}, tmp_path / "run"))


def test_can_be_planned(settings):
    config = configured({**settings, "invocation": TURN}, "unused")
    assert plan_run(config, steps_timed=1).tokens_per_second > 0
    assert plan_run(config, length=64, steps_timed=0).memory.peak > 0


def test_is_written_and_used_on_the_command_line(settings, tmp_path):
    run = tmp_path / "run"
    arguments = ["train", settings["data"], "--valid", settings["validation"], "--model", settings["model"]]
    arguments += ["--lora_r", "4", "--max-steps", "2", "--dtype", "fp32", "--device", "cpu", "--samples", "1"]
    result = CliRunner().invoke(main, [*arguments, "--invocation", TURN, "--output", str(run)])
    assert result.exit_code == 0, result.stderr
    assert "alora  invoked by" in result.stderr
    written = json.loads((run / "best" / "adapter_config.json").read_text())
    assert len(written["alora_invocation_tokens"]) == 11
    result = CliRunner().invoke(main, ["merge", "--adapter", str(run / "best"), "--output", str(tmp_path / "merged")])
    assert result.exit_code == 2
    assert "keep it unmerged" in result.stderr
