"""A tiny model and a tiny task on disk: a whole run takes a second or two."""

import pytest

from tiny_runs import save_base, save_data


@pytest.fixture(scope="session")
def base_folder(tmp_path_factory):
    """A saved model."""
    return save_base(tmp_path_factory.mktemp("base"))


@pytest.fixture(scope="session")
def data_files(tmp_path_factory):
    """(training file, validation file)."""
    return save_data(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="session")
def settings(base_folder, data_files):
    """Settings of a small run, for TrainConfig; tests change what they are about in a copy."""
    return {
        "model": str(base_folder),
        "data": str(data_files[0]),
        "validation": str(data_files[1]),
        "lora": {"r": 4, "alpha": 8.0, "dropout": 0.1},
        "batch_size": 6,
        "micro_batch_tokens": 120,
        "learning_rate": 5e-3,
        "max_steps": 10,
        "eval_steps": 4,
        "save_steps": 3,
        "dtype": "fp32",
        "device": "cpu",
        "samples": 2,
    }
