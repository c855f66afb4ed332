"""The verb `train`: what it prints, what it leaves, and how an interrupted run goes on."""

import io
import json
import os
import re
import signal
import subprocess
import sys
import time

import pytest
from click.testing import CliRunner
from rich.console import Console

from lorakit.cli import main
from lorakit.cli.progress import TrainingDisplay
from lorakit.config import read_yaml
from lorakit.training.config import TrainConfig
from lorakit.training.events import Evaluated, Phase, Resumed, StepDone, TrunkKept
from lorakit.training.run import train
from tiny_runs import metrics, save_base, save_data


@pytest.fixture(scope="module")
def arguments(tmp_path_factory):
    """Everything but --output."""
    train, valid = save_data(tmp_path_factory.mktemp("data"))
    base = save_base(tmp_path_factory.mktemp("base"))
    return [
        *("train", str(train), "--valid", str(valid), "--model", str(base), "--lora_r", "4", "--dtype", "fp32"),
        *("--per-device-train-batch-size", "6", "--lr", "5e-3", "--max-steps", "6", "--eval_steps", "3"),
        *("--samples", "1", "--device", "cpu"),
    ]


def test_says_how_the_base_is_held_and_that_a_start_is_an_update(arguments, tmp_path):
    result = CliRunner().invoke(
        main, [*arguments, "--output", str(tmp_path / "run"), "--quantize", "nf4", "--init", "loftq"]
    )
    assert result.exit_code == 0, result.stderr
    assert re.search(r"model  [\d.]+K parameters in nf4, fp32 on cpu; 14 layers adapted", result.stderr)
    assert re.search(r"step 0  valid [\d.]+  as the adapter begins; [\d.]+ base model\n", result.stderr)


def test_prints_few_lines_and_one_object(arguments, tmp_path):
    result = CliRunner().invoke(main, [*arguments, "--output", str(tmp_path / "run"), "--json"])
    assert result.exit_code == 0, result.stderr
    heads = [line.split()[0] for line in result.stderr.splitlines()]
    assert heads == ["data", "mask", "tokens", "plan", "model", "step", "step", "step", "done", "next"]
    assert "46 rows, messages: 40 train, 6 valid" in result.stderr
    assert "fp32 on cpu; 14 layers adapted, r=4" in result.stderr
    assert "step 6/6" in result.stderr
    (line,) = result.stdout.splitlines()
    run = json.loads(line)
    assert run.pop("ok") is True
    assert run == json.loads((tmp_path / "run" / "result.json").read_text())
    assert run["best_loss"] < run["initial_loss"]
    settings = read_yaml(tmp_path / "run" / "run.yaml")
    assert (settings["batch_size"], settings["learning_rate"], settings["lora"]["r"]) == (6, 5e-3, 4)


def test_auto_makes_steps_of_the_default_size(arguments, tmp_path):
    auto = [*arguments, "--per-device-train-batch-size", "auto", "--max-steps", "2", "--micro-batch-tokens", "300"]
    result = CliRunner().invoke(main, [*auto, "--samples", "0", "--output", str(tmp_path / "run")])
    assert result.exit_code == 0, result.stderr
    assert "rows at once, 16 a step" in result.stderr
    settings = read_yaml(tmp_path / "run" / "run.yaml")
    assert (settings["batch_size"], settings["micro_batch_tokens"]) == (16, 300)
    tokens = [row["tokens"] for row in metrics(tmp_path / "run") if "tokens" in row]
    assert len(tokens) == 2
    assert min(tokens) > 300


def test_a_used_folder_is_told_in_one_line(arguments, tmp_path):
    (tmp_path / "best").mkdir()
    result = CliRunner().invoke(main, [*arguments, "--output", str(tmp_path)])
    assert result.exit_code == 2
    assert result.stderr.startswith("error: ")
    assert "holds another run (best)" in result.stderr


def test_without_output_the_run_gets_a_new_folder(arguments, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    flags = ["--method", "sft", "--max-steps", "1", "--samples", "0", "--json"]
    result = CliRunner().invoke(main, [*arguments, *flags])
    assert result.exit_code == 0, result.stderr
    assert json.loads(result.stdout)["directory"] == "runs/train-1"
    assert "next   lorakit chat --adapter runs/train-1/best" in result.stderr
    settings = read_yaml(tmp_path / "runs" / "train-1" / "run.yaml")
    assert (settings["output"], settings["method"]) == (str(tmp_path / "runs" / "train-1"), "sft")


@pytest.mark.parametrize("settings", [None, {"model": "m", "data": "d"}])
def test_resume_without_output_says_what_is_missing(settings, tmp_path):
    file = tmp_path / "c.yaml"
    file.write_text(json.dumps(settings))
    result = CliRunner().invoke(main, ["train", "--resume", *(["--config", str(file)] if settings else [])])
    assert result.exit_code == 2
    assert ("resume: needs output" if settings else "--resume needs --output FOLDER") in result.stderr


def test_resume_without_a_run(tmp_path):
    result = CliRunner().invoke(main, ["train", "--resume", "--output", str(tmp_path / "absent")])
    assert result.exit_code == 2
    assert "error: " in result.stderr


def test_interrupted_process_goes_on_with_the_folder_alone(arguments, tmp_path):
    """Ctrl-C in a real process: exit code 130, and the command it names finishes the run."""
    folder = tmp_path / "run"
    command = [sys.executable, "-m", "lorakit", *arguments, "--max_steps", "40", "--output", str(folder)]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    wait_for(process, lambda: (folder / "metrics.jsonl").exists() and len(metrics(folder)) > 4)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 130
    assert f"next   lorakit train --resume --output {folder}" in errors
    assert "Traceback" not in errors
    result = CliRunner().invoke(main, ["train", "--resume", "--output", str(folder)])
    assert result.exit_code == 0, result.stderr
    assert "resume goes on after step" in result.stderr
    assert [row["step"] for row in metrics(folder) if "loss" in row] == list(range(1, 41))


def wait_for(process, condition, seconds=120):
    deadline = time.monotonic() + seconds
    while not condition():
        assert process.poll() is None, process.stderr.read()
        assert time.monotonic() < deadline, "the moment never came"


def test_resuming_with_another_setting_names_it(arguments, tmp_path):
    def interrupt(event):
        if isinstance(event, StepDone) and event.step == 2:
            os.kill(os.getpid(), signal.SIGINT)

    data, valid, base = arguments[1], arguments[3], arguments[5]
    folder = str(tmp_path / "run")
    settings = {"data": data, "valid": valid, "model": base, "output": folder, "max_steps": 6, "samples": 0}
    train(TrainConfig.from_dict(settings), interrupt)
    result = CliRunner().invoke(main, ["train", "--resume", "--output", folder, "--seed", "3"])
    assert result.exit_code == 2
    assert "seed: 0 then, 3 now" in result.stderr


def shown(events, *, terminal):
    stream = io.StringIO()
    with TrainingDisplay(
        Console(file=stream, force_terminal=terminal, width=100, soft_wrap=True, highlight=False)
    ) as display:
        for event in events:
            display(event)
    return stream.getvalue()


EVENTS = [
    Phase("loading the model"),
    Resumed(step=6, damaged=("step-8: damaged",), changed=("torch 2.12 -> 2.13",)),
    StepDone(7, 10, 2.0, 1e-3, 100, 0.5),
    StepDone(8, 10, 1.0, 1e-3, 300, 0.5),
    Evaluated(8, 1.25, True, 0.1),
]


def test_display_without_a_terminal_is_plain_lines():
    lines = shown(EVENTS, terminal=False).splitlines()
    assert lines[0] == "resume a checkpoint is damaged and was passed over: step-8: damaged"
    assert lines[1] == "resume goes on after step 6"
    assert "torch 2.12 -> 2.13" in lines[2]
    assert lines[3].startswith("step 8/10  loss 1.500  valid 1.250  400 tok/s  ")
    assert lines[3].endswith(" left  best so far")
    assert len(lines) == 4


def test_display_says_what_is_kept_of_the_trunk():
    line = "trunk  20 layers run once; 248,439 tokens of what they put out, 286 MB, are kept in memory\n"
    assert shown([TrunkKept(20, 248_439, 286_201_728, "memory")], terminal=False) == line


def test_display_on_a_terminal_moves_and_leaves_the_same_lines():
    text = shown(EVENTS, terminal=True)
    assert "\x1b[?25l" in text  # the cursor is hidden while the line moves
    assert "step 8/10  loss 1.500  valid 1.250  400 tok/s" in text.replace("\x1b[0m", "")
