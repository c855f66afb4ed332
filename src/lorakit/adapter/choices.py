"""What presets and other choices of `target_modules` come to in a model, before anything is trained: layers, numbers,
size of the file. From a skeleton; knows no files.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from torch import nn

from lorakit.adapter.blank import blank_adapter
from lorakit.adapter.config import PRESETS, LoRAConfig
from lorakit.adapter.presets import members
from lorakit.core.layer import base_modules, base_parameters
from lorakit.errors import TargetError


@dataclass(frozen=True, kw_only=True)
class Choice:
    """One choice of what to adapt.

    Attributes:
        targets: as it was written: presets, names.
        layers: how many weights get an update.
        parameters: numbers that are trained.
        share: of the base's parameters.
        bytes: of the adapter's tensors as they are saved, in fp32.
        target_modules: what it means in this model, as every library reads it.
        target_parameters: likewise.
        problem: why it cannot be had; empty where it can.
    """

    targets: str
    layers: int = 0
    parameters: int = 0
    share: float = 0.0
    bytes: int = 0
    target_modules: str | tuple[str, ...] = ()
    target_parameters: tuple[str, ...] = ()
    problem: str = ""

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return asdict(self)


def choices(model: nn.Module, config: LoRAConfig, asked: Sequence[str] = ()) -> list[Choice]:
    """What every preset comes to, and what is asked for besides.

    Args:
        model: on the meta device, or with numbers.
        config: ranks and all else.
        asked: one choice more, presets and names together.

    Raises:
        TargetError: what is asked for is not to be had.
    """
    base = sum(parameter.numel() for parameter in base_parameters(model).values())
    meant = members(model, dict(base_modules(model)))
    found = []
    for word in PRESETS:
        try:
            own = _choice(model, config, (word,), base) if meant[word] else Choice(targets=word, problem="none here")
        except TargetError as error:  # e.g. a rank that groups of a convolution do not divide
            own = Choice(targets=word, problem=str(error))
        found.append(own)
    return [*found, _choice(model, config, tuple(asked), base)] if asked else found


def _choice(model: nn.Module, config: LoRAConfig, targets: tuple[str, ...], base: int) -> Choice:
    adapter = blank_adapter(model, config.replace(target_modules=targets))
    parameters = sum(tensor.numel() for tensor in adapter.tensors().values())
    return Choice(
        targets=", ".join(targets),
        layers=len(adapter.factors),
        parameters=parameters,
        share=parameters / base,
        bytes=adapter.nbytes,
        target_modules=adapter.config.target_modules,
        target_parameters=adapter.config.target_parameters,
    )
