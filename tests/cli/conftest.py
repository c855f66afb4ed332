"""A tiny model and an adapter for it, on disk."""

import pytest

from tiny_models import byte_tokenizer
from tiny_subjects import save_adapter, save_model


@pytest.fixture(scope="session")
def base(tmp_path_factory):
    """Folder of a saved model."""
    return save_model(tmp_path_factory.mktemp("base"))


@pytest.fixture(scope="session")
def adapter(tmp_path_factory, base):
    """Folder of a saved adapter for `base`, with its tokenizer."""
    return save_adapter(tmp_path_factory.mktemp("adapter"), base, tokenizer=byte_tokenizer())
