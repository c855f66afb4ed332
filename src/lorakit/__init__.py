"""lorakit: a base model and a data file in; a small, measured, verified low-rank adapter (LoRA) out.

The public names are loaded on first use, so that `import lorakit` and `lorakit --help` do not import torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from lorakit.version import __version__

if TYPE_CHECKING:
    from lorakit.adapter.attach import AttachedAdapters as AttachedAdapters
    from lorakit.adapter.attach import adapters as adapters
    from lorakit.adapter.attach import attach as attach
    from lorakit.adapter.combine import combine as combine
    from lorakit.adapter.config import LoRAConfig as LoRAConfig
    from lorakit.adapter.prompt_config import PromptConfig as PromptConfig
    from lorakit.adapter.starts import Starts as Starts
    from lorakit.adapter.starts import starts_from_data as starts_from_data
    from lorakit.adapter.value import Adapter as Adapter
    from lorakit.errors import LorakitError as LorakitError
    from lorakit.evaluation import evaluate as evaluate
    from lorakit.generation import generate as generate
    from lorakit.merging import merge as merge
    from lorakit.models import load_model as load_model
    from lorakit.originals import starts_from_original as starts_from_original
    from lorakit.training.config import TrainConfig as TrainConfig
    from lorakit.training.run import Run as Run
    from lorakit.training.run import train as train

_PUBLIC = {
    "Adapter": "lorakit.adapter.value",
    "AttachedAdapters": "lorakit.adapter.attach",
    "LoRAConfig": "lorakit.adapter.config",
    "LorakitError": "lorakit.errors",
    "PromptConfig": "lorakit.adapter.prompt_config",
    "Run": "lorakit.training.run",
    "Starts": "lorakit.adapter.starts",
    "TrainConfig": "lorakit.training.config",
    "adapters": "lorakit.adapter.attach",
    "attach": "lorakit.adapter.attach",
    "combine": "lorakit.adapter.combine",
    "evaluate": "lorakit.evaluation",
    "generate": "lorakit.generation",
    "load_model": "lorakit.models",
    "merge": "lorakit.merging",
    "starts_from_data": "lorakit.adapter.starts",
    "starts_from_original": "lorakit.originals",
    "train": "lorakit.training.run",
}

__all__ = ["__version__", *_PUBLIC]


def __getattr__(name: str) -> Any:
    """Import the module that holds `name`, once."""
    if name not in _PUBLIC:
        raise AttributeError(f"module 'lorakit' has no attribute {name!r}; it has {', '.join(_PUBLIC)}")
    value = getattr(importlib.import_module(_PUBLIC[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted([*globals(), *_PUBLIC])
