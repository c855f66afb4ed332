"""PEFT's containers over lorakit's tensors: `layer.lora_A["default"].weight` is the parameter that lorakit trains.

A view holds no tensor of its own. It is a module, so that `named_parameters()` and `state_dict()` give PEFT's names,
but nothing calls it in a forward pass: hooks on it do not run.
"""

from __future__ import annotations

from collections.abc import Callable, ItemsView, Iterator, KeysView, Mapping, MutableMapping
from typing import Any

import torch
from torch import nn

from lorakit.compat.peft.stacked import parameter_name
from lorakit.core.deltas import LoRA
from lorakit.core.dora import DoRA


class ByName(nn.ModuleDict):
    """A ModuleDict by adapter name that takes any name: `keys`, `train` and `a.b` too."""

    def show(self, modules: Mapping[str, nn.Module]) -> None:
        """Hold `modules` and nothing else."""
        self._modules.clear()
        self._modules.update(modules)


class ParametersByName(nn.ParameterDict):
    """A ParameterDict by adapter name that takes any name."""

    def show(self, parameters: Mapping[str, nn.Parameter]) -> None:
        """Hold `parameters` and nothing else."""
        self._parameters.clear()
        self._parameters.update(parameters)

    def __repr__(self) -> str:
        shapes = [f"({name}): {tuple(p.shape)}" for name, p in self._parameters.items() if p is not None]
        return f"ParametersByName({', '.join(shapes)})"

    def __getitem__(self, key: str) -> Any:
        return self._parameters[key]

    def __contains__(self, key: object) -> bool:
        return key in self._parameters

    def __len__(self) -> int:
        return len(self._parameters)

    def __iter__(self) -> Iterator[str]:
        return iter(self._parameters)

    def keys(self) -> KeysView[str]:
        """Adapter names."""
        return self._parameters.keys()

    def items(self) -> ItemsView[str, Any]:
        """(adapter name, parameter)."""
        return self._parameters.items()


class _Factor:
    """A or B of one LoRA as the module PEFT has for it. Giving it another weight gives it to the LoRA."""

    source: tuple[LoRA, str]  # in a tuple, so that it is no submodule

    def register_parameter(self, name: str, param: nn.Parameter | None) -> None:
        super().register_parameter(name, param)  # type: ignore[misc]
        if name in ("weight", "bias") and "source" in self.__dict__:
            lora, own_name = self.source
            setattr(lora, own_name if name == "weight" else "bias", param)


class LinearFactor(_Factor, nn.Linear):
    """A or B of a matrix."""


class Conv1dFactor(_Factor, nn.Conv1d):
    """A or B of a convolution."""


class Conv2dFactor(_Factor, nn.Conv2d):
    """A or B of a convolution."""


class Conv3dFactor(_Factor, nn.Conv3d):
    """A or B of a convolution."""


class Dropout(nn.Dropout):
    """The dropout of one LoRA; its `p` is the LoRA's."""

    def __init__(self, lora: LoRA) -> None:
        nn.Module.__init__(self)
        self.source = (lora,)
        self.inplace = False

    @property
    def p(self) -> float:
        """Probability."""
        return self.source[0].dropout

    @p.setter
    def p(self, value: float) -> None:
        self.source[0].dropout = value


class DoraLinearLayer(nn.Module):
    """The magnitudes of one DoRA: its `weight` is theirs. PEFT calls a layer's so, whatever the layer."""

    def __init__(self, dora: DoRA) -> None:
        super().__init__()
        self.source = (dora,)
        self._parameters["weight"] = dora.magnitude

    def register_parameter(self, name: str, param: nn.Parameter | None) -> None:
        """Giving it another weight gives it to the DoRA."""
        super().register_parameter(name, param)
        if name == "weight" and "source" in self.__dict__ and param is not None:
            self.source[0].magnitude = param


class TiedFactor(nn.Module):
    """A or B of a layer that has the update of an embedding: a view of the embedding's factors, and no parameter."""

    def __init__(self, lora: LoRA, letter: str) -> None:
        super().__init__()
        self.source = (lora, letter)

    @property
    def weight(self) -> torch.Tensor:
        """The factor."""
        lora, letter = self.source
        factor: torch.Tensor = getattr(lora, letter)
        return factor

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        destination[f"{prefix}weight"] = self.weight if keep_vars else self.weight.detach()


_CONVOLUTIONS: dict[int, type[nn.Module]] = {3: Conv1dFactor, 4: Conv2dFactor, 5: Conv3dFactor}


def factor(lora: LoRA, letter: str, layer: Any) -> nn.Module:
    """The view of A or B of `lora` on `layer`."""
    if lora.origin is not lora:
        return TiedFactor(lora, letter)
    own_name = parameter_name(lora, letter)
    weight: nn.Parameter = getattr(lora, own_name)
    width, bias = weight.shape[1], lora.bias if letter == "B" else None
    made: nn.Module
    with torch.device("meta"):  # what the constructor draws is thrown away
        if weight.ndim == 2:
            made = LinearFactor(width, weight.shape[0], bias=bias is not None)
        else:
            geometry: dict[str, Any] = {"groups": layer.groups}
            if letter == "A":
                geometry = {name: getattr(layer, name) for name in ("stride", "padding", "dilation", "padding_mode")}
                geometry["groups"] = layer.in_channels // width
            geometry["bias"] = bias is not None
            made = _CONVOLUTIONS[weight.ndim](width * geometry["groups"], weight.shape[0], weight.shape[2:], **geometry)
    made._parameters.update(weight=weight, bias=bias)
    made.source = (lora, own_name)  # type: ignore[assignment]
    return made


class Width:
    """Width of a layer's input or output, for layers that have no attribute of that name of their own."""

    def __init__(self, dimension: int) -> None:
        self._dimension = dimension

    def __get__(self, layer: Any, owner: Any = None) -> int:
        if layer is None:
            raise AttributeError("in_features and out_features are a layer's")
        groups = getattr(layer, "groups", 1)
        shape = layer.lorakit_site.shapes(layer, groups, "")[1 - self._dimension]
        return int(shape[self._dimension]) * (groups if self._dimension else 1)


class PerAdapter(MutableMapping[str, Any]):
    """One number for each adapter of a layer, read from its LoRA and, where there is a setter, written to it."""

    def __init__(
        self,
        loras: Callable[[], Mapping[str, LoRA]],
        read: Callable[[str, LoRA], Any],
        write: Callable[[LoRA, Any], None] | None = None,
    ) -> None:
        self._loras, self._read, self._write = loras, read, write

    def __getitem__(self, name: str) -> Any:
        return self._read(name, self._loras()[name])

    def __setitem__(self, name: str, value: Any) -> None:
        if self._write is None:
            raise TypeError("this follows from the adapter's tensors and config, and cannot be set")
        self._write(self._loras()[name], value)

    def __delitem__(self, name: str) -> None:
        raise TypeError("adapters are deleted by model.delete_adapter(name)")

    def __iter__(self) -> Iterator[str]:
        return iter(self._loras())

    def __len__(self) -> int:
        return len(self._loras())

    def __repr__(self) -> str:
        return repr(dict(self))
