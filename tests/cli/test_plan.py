"""`lorakit plan`: what people read, and what is refused."""

import json

import pytest
from click.testing import CliRunner

from lorakit import machine
from lorakit.cli import main
from lorakit.config import read_yaml
from lorakit.training import planning
from tiny_runs import save_base, save_data


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    train, valid = save_data(tmp_path_factory.mktemp("data"))
    return [str(train), "--valid", str(valid), "--model", str(save_base(tmp_path_factory.mktemp("base")))]


def plan(*arguments):
    return CliRunner().invoke(main, ["plan", *arguments])


def test_says_memory_time_and_whether_it_fits(files):
    result = plan(*files, "--dtype", "fp32", "--memory", "16GB", "--steps-timed", "1", "--json")
    assert result.exit_code == 0, result.stderr
    assert [line.split()[0] for line in result.stderr.splitlines()] == [
        *("model", "steps", "memory", "time", "limit"),
        *("fits", "fits"),  # with and without checkpointing
    ]
    assert "16 GB: fits" in result.stderr
    found = json.loads(result.stdout)
    assert found["fits"]
    memory = found["memory"]
    assert memory["peak"] == memory["process"] + memory["held"] + memory["weights"] + memory["adapter"] + max(
        memory["training"], memory["evaluation"]
    )
    assert found["tokens_per_second"] > 0


def test_proposes_what_fits_and_says_what_else_would(files, monkeypatch):
    monkeypatch.setattr(machine, "resident_memory", lambda: 0)
    monkeypatch.setattr(planning, "LOADED_LATER", 0)
    rows = ["--length", "512", "--max-length", "512", "--dtype", "fp32", *files[3:]]
    asked = json.loads(plan(*rows, "--json").stdout)
    peaks = {each["gradient_checkpointing"]: each["peak"] for each in asked["fitting"]}
    between = str((peaks[True] + peaks[False]) // 2)
    result = plan(*rows, "--memory", between)
    assert "fits as chosen here; as asked it takes" in result.stderr
    assert "8 rows x 2 a step: --micro-batch-tokens 4096 --gradient-checkpointing on" in result.stderr
    refused = plan(*rows, "--memory", between, "--gradient-checkpointing", "off")
    assert ": does not fit" in refused.stderr
    assert "--micro-batch-tokens 2048 --gradient-checkpointing off" in refused.stderr
    least = json.loads(plan(*rows, "--micro-batch-tokens", "512", "--gradient-checkpointing", "on", "--json").stdout)
    tight = plan(*rows, "--memory", str(int(0.9 * least["memory"]["peak"])), "--json")
    found = json.loads(tight.stdout)
    assert not found["fits"]
    assert "nothing that leaves the result as it is fits" in tight.stderr
    assert [each["flag"] for each in found["suggestions"]] == ["max_length"]
    assert all(each["setting"]["peak"] <= found["limit"] for each in found["suggestions"])
    assert "another result, 16 rows are cut" in tight.stderr
    assert "nor with a base in fewer bits" in plan(*rows, "--memory", "1kB").stderr


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--length", "64"], "leave one of them out"),
        (["--memory", "much"], "write 16GB or 800MB"),
    ],
)
def test_refuses(files, arguments, message):
    result = plan(*files, *arguments)
    assert result.exit_code == 2
    assert message in result.stderr


def test_needs_rows_of_some_kind(files):
    result = plan(*files[3:])
    assert result.exit_code == 2
    assert "give DATA, or --length N" in result.stderr


def test_train_chooses_what_fits(files, tmp_path, monkeypatch):
    short = ["train", *files, "--max-steps", "2", "--samples", "0", "--dtype", "fp32", "--device", "cpu"]
    asked = json.loads(plan(*files, "--dtype", "fp32", "--steps-timed", "0", "--json").stdout)
    peaks = {each["gradient_checkpointing"]: each["peak"] for each in asked["fitting"]}
    assert peaks[True] < peaks[False]
    # the process grows between the two plans
    monkeypatch.setattr(machine, "resident_memory", lambda: 0)
    monkeypatch.setattr(planning, "LOADED_LATER", 0)
    process = asked["memory"]["process"]
    monkeypatch.setattr(machine, "memory_for", lambda device: (peaks[True] + peaks[False]) // 2 - process)
    result = CliRunner().invoke(main, [*short, "--output", str(tmp_path / "run")])
    assert result.exit_code == 0, result.stderr
    settings = read_yaml(tmp_path / "run" / "run.yaml")
    assert settings["gradient_checkpointing"] == "on" or settings["micro_batch_tokens"] < 4096
    monkeypatch.setattr(machine, "memory_for", lambda device: 1000)
    result = CliRunner().invoke(main, [*short, "--output", str(tmp_path / "other")])
    assert result.exit_code == 2
    assert "lorakit plan shows what takes how much" in result.stderr
    result = CliRunner().invoke(main, [*short, "--output", str(tmp_path / "third"), "--gradient-checkpointing", "on"])
    assert result.exit_code == 0, result.stderr
