"""How the frozen weights of a run multiply: which layers may do it in integers, what it takes, and what is refused.

The numbers are `core.int8`'s.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch

from lorakit import machine
from lorakit.core import int8
from lorakit.core.layer import AdaptedLayer
from lorakit.core.products import int8_obstacle, int8_products, takes_int8
from lorakit.errors import ConfigError
from lorakit.training.config import FrozenProducts

_EXACT = "leave frozen_products at exact"


def refuse_products(kind: FrozenProducts, device: torch.device, dtype: torch.dtype) -> None:
    """Find out whether this machine can multiply so, and gains by it.

    Args:
        kind: as configured.
        device: of the run.
        dtype: of its base.

    Raises:
        ConfigError: it cannot, or would be slower.
    """
    if kind == "exact":
        return
    if obstacle := int8_obstacle(device):
        raise ConfigError(f"frozen_products: {kind} is not for this run: {obstacle}; {_EXACT}")
    speedup = machine.int8_speedup(dtype)
    if speedup < 1:
        raise ConfigError(
            f"frozen_products: {kind} would be slower here, and less accurate: on this processor a product in integers "
            f"has {speedup:.2f} times the speed of one in {str(dtype).removeprefix('torch.')}; {_EXACT}"
        )


def int8_layers(model: Any) -> list[AdaptedLayer]:
    """The adapted layers that multiply in integers: by one frozen matrix, the output head left out, whose errors would
    be the logits'.

    Raises:
        ConfigError: there are none.
    """
    head = model.get_output_embeddings()
    found = [m for m in model.modules() if isinstance(m, AdaptedLayer) and m is not head and takes_int8(m)]
    if not found:
        raise ConfigError(
            f"frozen_products: int8 is for adapted layers with one frozen matrix, of which {type(model).__name__} has "
            f"none besides its output head; {_EXACT}"
        )
    return found


def products_bytes(model: Any, kind: FrozenProducts) -> int:
    """Memory of what is made beside the weights: a byte for each number of them that multiplies in integers.

    Raises:
        ConfigError: no layer can.
    """
    if kind == "exact":
        return 0
    weights = [layer.get_parameter("weight") for layer in int8_layers(model)]
    return sum(int8.nbytes(*weight.shape) for weight in weights)


@contextlib.contextmanager
def frozen_products(model: Any, kind: FrozenProducts) -> Iterator[None]:
    """While entered, the frozen weights of `model` multiply as `kind` says in train mode; exactly in evaluation.

    Args:
        model: a transformers model with an adapter attached.
        kind: exact does nothing.

    Raises:
        ConfigError: its device or its layers cannot.
    """
    if kind == "exact":
        yield
        return
    refuse_products(kind, model.device, model.dtype)
    with int8_products(int8_layers(model)):
        yield
