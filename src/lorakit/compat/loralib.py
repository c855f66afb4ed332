"""loralib's public API (`import lorakit.compat.loralib as lora`): layers with their update built in, names of
parameters and state dicts as there.

Results are loralib's except where it is silently wrong; `docs/compat.md` lists each place. The largest: weights are
never merged in place. loralib adds the update to `weight` on `eval()` and subtracts it on `train()`, which rounds each
time and corrupts a state dict loaded or saved in between; here both modes compute base plus update, `weight` is always
the base, and `layer.weight + layer.delta()` the merged one.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from lorakit.core import lowrank
from lorakit.core.sites import EMBEDDING, LINEAR, TRANSPOSED_LINEAR
from lorakit.errors import ConfigError

__all__ = [
    "Conv1d",
    "Conv2d",
    "Conv3d",
    "ConvLoRA",
    "Embedding",
    "Linear",
    "LoRALayer",
    "MergedLinear",
    "lora_state_dict",
    "mark_only_lora_as_trainable",
]


class LoRALayer:
    """What all layers share.

    Attributes:
        r: rank; 0: a plain, trainable layer.
        lora_alpha: numerator of the scale.
        lora_dropout: applied to the input of A.
        merged: always False.
        merge_weights: accepted and kept; nothing is merged in place.
    """

    lora_A: nn.Parameter  # noqa: N815 - loralib's name
    lora_B: nn.Parameter  # noqa: N815

    def __init__(self, r: int, lora_alpha: float, lora_dropout: float, merge_weights: bool) -> None:
        if r < 0:
            raise ConfigError(f"r: must not be negative (got {r})")
        self.r = r
        self.lora_alpha = lora_alpha
        self.lora_dropout = nn.Dropout(lora_dropout) if lora_dropout > 0 else nn.Identity()
        self.merged = False
        self.merge_weights = merge_weights

    def _give_factors(self, weight: torch.Tensor, shape_A: Sequence[int], shape_B: Sequence[int]) -> None:
        """A and B of the weight's dtype and device, the scale, and the weight frozen."""
        self.lora_A = nn.Parameter(weight.new_zeros(tuple(shape_A)))
        self.lora_B = nn.Parameter(weight.new_zeros(tuple(shape_B)))
        self.scaling = lowrank.scale(self.lora_alpha, self.r)
        weight.requires_grad = False

    def _start_factors(self) -> None:
        """A as `nn.Linear` starts its weight, B zero; nothing before they are there."""
        if hasattr(self, "lora_A"):
            nn.init.kaiming_uniform_(self.lora_A, a=math.sqrt(5))
            nn.init.zeros_(self.lora_B)


class _OnLinear(nn.Linear, LoRALayer):
    """What `Linear` and `MergedLinear` share: the frozen layer, whichever way round its weight lies."""

    fan_in_fan_out: bool

    def _lay_out(self) -> None:
        """Draw all tensors a second time, as loralib does: the same draws give the same numbers. Then turn the weight
        round.
        """
        self.reset_parameters()
        if self.fan_in_fan_out:
            self.weight.data = self.weight.data.T.contiguous()

    def reset_parameters(self) -> None:
        """Fresh weights and factors."""
        nn.Linear.reset_parameters(self)
        self._start_factors()

    def _base_output(self, x: torch.Tensor) -> torch.Tensor:
        """(..., in) -> (..., out), without the update."""
        return F.linear(x, self.weight.T if self.fan_in_fan_out else self.weight, self.bias)


class Linear(_OnLinear):
    """`nn.Linear` plus scaling * x A^T B^T, with A (r, in), B (out, r)."""

    def __init__(
        self,
        in_features: int,
        out_features: int,
        r: int = 0,
        lora_alpha: float = 1,
        lora_dropout: float = 0.0,
        fan_in_fan_out: bool = False,
        merge_weights: bool = True,
        **kwargs: Any,
    ) -> None:
        nn.Linear.__init__(self, in_features, out_features, **kwargs)
        LoRALayer.__init__(self, r, lora_alpha, lora_dropout, merge_weights)
        self.fan_in_fan_out = fan_in_fan_out
        if r > 0:
            self._give_factors(self.weight, *LINEAR.shapes(self, r, "Linear"))
        self._lay_out()

    def delta(self) -> torch.Tensor:
        """The dense update, scale included, in the layout of `weight`."""
        site = TRANSPOSED_LINEAR if self.fan_in_fan_out else LINEAR
        return site.dense(self.lora_A, self.lora_B, self.scaling)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(..., in) -> (..., out)."""
        y = self._base_output(x)
        if self.r == 0:
            return y
        return y + LINEAR.up(self, LINEAR.down(self, self.lora_dropout(x), self.lora_A), self.lora_B) * self.scaling


class MergedLinear(_OnLinear):
    """`nn.Linear` whose output is n equal parts, k of them each with an update of rank r: A (k r, in), B (k out/n,
    r).
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        r: int = 0,
        lora_alpha: float = 1,
        lora_dropout: float = 0.0,
        enable_lora: Sequence[bool] = (False,),
        fan_in_fan_out: bool = False,
        merge_weights: bool = True,
        **kwargs: Any,
    ) -> None:
        nn.Linear.__init__(self, in_features, out_features, **kwargs)
        LoRALayer.__init__(self, r, lora_alpha, lora_dropout, merge_weights)
        if not enable_lora or out_features % len(enable_lora):
            raise ConfigError(
                f"enable_lora has {len(enable_lora)} entries, which do not divide {out_features} outputs equally"
            )
        self.enable_lora = enable_lora
        self.fan_in_fan_out = fan_in_fan_out
        self._enabled = [part for part, enabled in enumerate(enable_lora) if enabled]
        if r > 0 and self._enabled:
            part, k = out_features // len(enable_lora), len(self._enabled)
            self._give_factors(self.weight, (k * r, in_features), (k * part, r))
        self._lay_out()

    def delta(self) -> torch.Tensor:
        """The dense update, scale included, in the layout of `weight`."""
        parts = lowrank.convolution_delta(self.lora_A, self.lora_B, self.scaling)  # (k out/n, in): a grouped product
        dense = self._spread(parts.T).T
        return dense.T if self.fan_in_fan_out else dense

    def _spread(self, parts: torch.Tensor) -> torch.Tensor:
        """(..., k out/n) -> (..., out), zero in the parts without update."""
        k, n = len(self._enabled), len(self.enable_lora)
        parts = parts.reshape(*parts.shape[:-1], k, -1)
        whole = parts.new_zeros(*parts.shape[:-2], n, parts.shape[-1])
        whole[..., self._enabled, :] = parts
        return whole.flatten(-2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(..., in) -> (..., out)."""
        y = self._base_output(x)
        if self.r == 0 or not self._enabled:
            return y
        k = len(self._enabled)
        h = LINEAR.down(self, self.lora_dropout(x), self.lora_A).view(*x.shape[:-1], k, self.r)
        B = self.lora_B.view(k, -1, self.r)  # (k, out/n, r)
        return y + self._spread(torch.einsum("...kr,kor->...ko", h, B).flatten(-2)) * self.scaling


class Embedding(nn.Embedding, LoRALayer):
    """`nn.Embedding` plus scaling * (rows of A^T) B^T, with A (r, vocabulary), zero at first, and B (dim, r)."""

    def __init__(
        self,
        num_embeddings: int,
        embedding_dim: int,
        r: int = 0,
        lora_alpha: float = 1,
        merge_weights: bool = True,
        **kwargs: Any,
    ) -> None:
        nn.Embedding.__init__(self, num_embeddings, embedding_dim, **kwargs)
        LoRALayer.__init__(self, r, lora_alpha, 0.0, merge_weights)
        if r > 0:
            if self.max_norm is not None:
                raise ConfigError(
                    "Embedding: max_norm rewrites the weight in each forward, so it cannot be kept frozen"
                )
            self._give_factors(self.weight, *EMBEDDING.shapes(self, r, "Embedding"))
        if kwargs.get("_weight") is None:
            self.reset_parameters()
        else:
            self._start_factors()  # the weight is the caller's

    def reset_parameters(self) -> None:
        """Fresh weights and factors."""
        nn.Embedding.reset_parameters(self)
        self._start_factors()

    def _start_factors(self) -> None:
        if hasattr(self, "lora_A"):
            nn.init.zeros_(self.lora_A)
            nn.init.normal_(self.lora_B)

    def delta(self) -> torch.Tensor:
        """The dense update (vocabulary, dim), scale included."""
        return EMBEDDING.dense(self.lora_A, self.lora_B, self.scaling)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Indices (...) -> (..., dim)."""
        y = nn.Embedding.forward(self, x)
        if self.r == 0:
            return y
        options: dict[str, Any] = {"scale_grad_by_freq": self.scale_grad_by_freq, "sparse": self.sparse}
        h = F.embedding(x, self.lora_A.T, self.padding_idx, **options)
        return y + EMBEDDING.up(self, h, self.lora_B) * self.scaling


class ConvLoRA(nn.Module, LoRALayer):
    """A convolution, in `conv`, plus an update of its weight: the product of B (k out/groups, k r) and A (k r, k in),
    read row after row as a weight. `Conv2d` is what loralib's shapes are made for; in one and three dimensions they
    make a weight for a kernel of one only.
    """

    def __init__(
        self,
        conv_module: type[nn.Conv1d | nn.Conv2d | nn.Conv3d],
        in_channels: int,
        out_channels: int,
        kernel_size: int,
        r: int = 0,
        lora_alpha: float = 1,
        lora_dropout: float = 0.0,
        merge_weights: bool = True,
        **kwargs: Any,
    ) -> None:
        super().__init__()
        self.conv = conv_module(in_channels, out_channels, kernel_size, **kwargs)
        LoRALayer.__init__(self, r, lora_alpha, lora_dropout, merge_weights)
        if not isinstance(kernel_size, int):
            raise ConfigError(f"kernel_size: one number, for a square kernel (got {kernel_size!r})")
        if r > 0:
            shape_A = (r * kernel_size, in_channels * kernel_size)
            shape_B = (out_channels // self.conv.groups * kernel_size, r * kernel_size)
            if shape_B[0] * shape_A[1] != self.conv.weight.numel():
                raise ConfigError(
                    f"{type(self).__name__}: loralib's factors for a kernel of {kernel_size} make no weight of shape "
                    f"{tuple(self.conv.weight.shape)}; use lorakit.attach, which adapts every convolution"
                )
            self._give_factors(self.conv.weight, shape_A, shape_B)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Fresh weights and factors."""
        self.conv.reset_parameters()
        self._start_factors()

    def delta(self) -> torch.Tensor:
        """The dense update, scale included, in the layout of `conv.weight`."""
        return lowrank.matrix_delta(self.lora_A, self.lora_B, self.scaling).view(self.conv.weight.shape)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """As the convolution."""
        y: torch.Tensor
        weight, bias = self.conv.weight, self.conv.bias
        if self.r == 0:
            y = self.conv(x)
        elif self.training and isinstance(self.lora_dropout, nn.Dropout):
            y = self.conv._conv_forward(x, weight, bias)
            y = y + self.conv._conv_forward(self.lora_dropout(x), self.delta(), None)
        else:
            y = self.conv._conv_forward(x, weight + self.delta(), bias)
        return y


class Conv2d(ConvLoRA):
    """`ConvLoRA` over `nn.Conv2d`."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(nn.Conv2d, *args, **kwargs)


class Conv1d(ConvLoRA):
    """`ConvLoRA` over `nn.Conv1d`."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(nn.Conv1d, *args, **kwargs)


class Conv3d(ConvLoRA):
    """`ConvLoRA` over `nn.Conv3d`."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(nn.Conv3d, *args, **kwargs)


# ---------------------------------------------------------------- the model's parameters


def mark_only_lora_as_trainable(model: nn.Module, bias: str = "none") -> None:
    """Freeze all but the factors, and but the biases that `bias` names.

    Args:
        model: with layers of this module.
        bias: "none", "all" of the model's, or those of adapted layers: "lora_only".

    Raises:
        ConfigError: another value of `bias`.
    """
    biases = _biases(model, bias)
    for name, parameter in model.named_parameters():
        if "lora_" not in name:
            parameter.requires_grad = False
        if name in biases:
            parameter.requires_grad = True


def lora_state_dict(model: nn.Module, bias: str = "none") -> dict[str, torch.Tensor]:
    """What of the state dict belongs to the factors, and to the biases that `bias` names.

    Args:
        model: with layers of this module.
        bias: as in `mark_only_lora_as_trainable`.

    Raises:
        ConfigError: another value of `bias`.
    """
    biases = _biases(model, bias)
    return {name: tensor for name, tensor in model.state_dict().items() if "lora_" in name or name in biases}


def _biases(model: nn.Module, which: str) -> set[str]:
    """Names of the parameters that `which` means: those called bias, not those of a module with bias in its name."""
    if which == "none":
        return set()
    if which == "all":
        return {name for name, _ in model.named_parameters(remove_duplicate=False) if "bias" in name.rsplit(".", 1)[-1]}
    if which != "lora_only":
        raise ConfigError(f"bias is 'none', 'all' or 'lora_only' (got {which!r})")
    found = set()
    for path, module in model.named_modules(remove_duplicate=False):
        if isinstance(module, LoRALayer):
            own = f"{path}.conv.bias" if isinstance(module, ConvLoRA) else f"{path}.bias"
            found.add(own.removeprefix("."))
    return found
