"""A real process is killed, in a step and inside the write of a checkpoint; the resumed run is as if it were not."""

import json
import os
import signal
import subprocess
import sys
import time

import pytest
import torch

from lorakit.training.run import train
from tiny_runs import assert_same_run, configured

TRAIN = (
    "import json, sys; from lorakit import TrainConfig, train; train(TrainConfig.from_dict(json.loads(sys.argv[1])))"
)


@pytest.fixture(scope="module")
def long_settings(settings):
    """Enough steps to be hit among them, a checkpoint after each."""
    return {**settings, "max_steps": 30, "eval_steps": 7, "save_steps": 1, "samples": 1}


@pytest.fixture(scope="module")
def straight(long_settings, tmp_path_factory):
    folder = tmp_path_factory.mktemp("straight") / "run"
    train(configured(long_settings, folder))
    return folder


def start(settings, folder, **changes):
    argument = json.dumps({**settings, "output": str(folder), **changes})
    environment = {**os.environ, "OMP_NUM_THREADS": str(torch.get_num_threads())}  # rounding depends on it
    return subprocess.Popen([sys.executable, "-c", TRAIN, argument], stderr=subprocess.PIPE, env=environment)


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
    names = [path.name for path in (folder / "checkpoints").glob("*")]
    newest = max((int(name[5:]) for name in names if name.startswith("step-")), default=0)
    building = [name for name in names if name.startswith(".tmp-")]
    return newest >= after and bool(building)


def test_killed_twice_and_resumed_is_bit_identical(long_settings, straight, tmp_path):
    folder = tmp_path / "run"
    process = start(long_settings, folder)
    kill_when(process, lambda: steps_done(folder) >= 5)
    process = start(long_settings, folder, resume=True)
    kill_when(process, lambda: in_the_middle_of_a_write(folder, after=14))
    leftovers = list((folder / "checkpoints").glob(".tmp-*"))
    run = train(configured(long_settings, folder, resume=True))
    assert not [path for path in leftovers if path.exists()]
    assert (run.step, run.interrupted) == (30, False)
    assert_same_run(straight, folder)


def test_killed_before_the_first_checkpoint(long_settings, straight, tmp_path):
    folder = tmp_path / "run"
    process = start(long_settings, folder)
    kill_when(process, lambda: (folder / "samples.json").exists())
    train(configured(long_settings, folder, resume=True))
    assert_same_run(straight, folder)
