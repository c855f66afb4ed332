"""A real process is killed, at any moment and inside the write of a checkpoint; the resumed run is the uninterrupted one, bit for bit."""

import json
import os
import signal
import subprocess
import sys
import time

import pytest

from lorakit.training.run import train
from tiny_runs import assert_same_run, configured

TRAIN = (
    "import json, sys; from lorakit import TrainConfig, train; train(TrainConfig.from_dict(json.loads(sys.argv[1])))"
)


@pytest.fixture(scope="module")
def long_settings(settings):
    """Enough steps to be hit among them, a checkpoint after each."""
    return {**settings, "max_steps": 60, "eval_steps": 7, "save_steps": 1, "samples": 1}


@pytest.fixture(scope="module")
def straight(long_settings, tmp_path_factory):
    folder = tmp_path_factory.mktemp("straight") / "run"
    train(configured(long_settings, folder))
    return folder


def start(settings, folder, **changes):
    argument = json.dumps({**settings, "output": str(folder), **changes})
    return subprocess.Popen(
        [sys.executable, "-c", TRAIN, argument],
        stderr=subprocess.PIPE,
        env={**os.environ, "OMP_NUM_THREADS": str(_threads())},
    )


def _threads():
    import torch

    return torch.get_num_threads()  # rounding depends on it


def kill_when(process, condition, seconds=120):
    """SIGKILL the process as soon as the condition holds; it must still be running then."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert process.poll() is None, process.stderr.read().decode()
        assert time.monotonic() < deadline, "the moment to kill at never came"
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    process.stderr.close()


def steps_done(folder):
    path = folder / "metrics.jsonl"
    return path.read_bytes().count(b'"loss"') if path.exists() else 0


def in_the_middle_of_a_write(folder, after):
    """A temporary folder with a file in it, and checkpoints from `after` on committed."""
    try:
        names = os.listdir(folder / "checkpoints")
    except FileNotFoundError:
        return False
    newest = max((int(name[5:]) for name in names if name.startswith("step-")), default=0)
    building = [name for name in names if name.startswith(".tmp-")]
    return newest >= after and bool(building)


def test_killed_twice_and_resumed_is_bit_identical(long_settings, straight, tmp_path):
    folder = tmp_path / "run"
    process = start(long_settings, folder)
    kill_when(process, lambda: steps_done(folder) >= 9)
    process = start(long_settings, folder, resume=True)
    kill_when(process, lambda: in_the_middle_of_a_write(folder, after=25))
    leftovers = list((folder / "checkpoints").glob(".tmp-*"))
    run = train(configured(long_settings, folder, resume=True))
    assert not [path for path in leftovers if path.exists()]
    assert (run.step, run.interrupted) == (60, False)
    assert_same_run(straight, folder)


def test_killed_before_the_first_checkpoint(long_settings, straight, tmp_path):
    folder = tmp_path / "run"
    process = start(long_settings, folder)
    kill_when(process, lambda: (folder / "samples.json").exists())
    train(configured(long_settings, folder, resume=True))
    assert_same_run(straight, folder)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_signals_save_and_leave_a_run_that_goes_on(long_settings, straight, tmp_path, number):
    folder = tmp_path / "run"
    process = start(long_settings, folder)
    while steps_done(folder) < 5:
        assert process.poll() is None, process.stderr.read().decode()
    process.send_signal(number)
    assert process.wait(60) == 0
    process.stderr.close()
    result = json.loads((folder / "result.json").read_text())
    assert result["interrupted"]
    assert 5 <= result["step"] < 60
    train(configured(long_settings, folder, resume=True))
    assert_same_run(straight, folder)
