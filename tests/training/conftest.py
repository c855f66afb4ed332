"""A tiny model and a tiny task on disk: a whole run takes a second or two."""

import pytest

from tiny_models import byte_tokenizer, tiny_llama
from tiny_runs import rows, write_rows


@pytest.fixture(scope="session")
def base_folder(tmp_path_factory):
    """A saved Llama of 2 layers with a byte tokenizer and the ChatML template."""
    folder = tmp_path_factory.mktemp("base")
    tiny_llama(context=512).save_pretrained(folder)
    byte_tokenizer(eos="<|im_end|>").save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def data_files(tmp_path_factory):
    """(training file of 40 rows, validation file of 6)."""
    folder = tmp_path_factory.mktemp("data")
    return write_rows(folder / "train.jsonl", rows(40)), write_rows(folder / "valid.jsonl", rows(6, start=1000))


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
