"""What an adapter holds for one module: a low-rank update, a trained bias, or a whole trained copy. These modules own
the trainable tensors.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from lorakit.core import kernels, lowrank
from lorakit.core.prompts import SoftPrompt
from lorakit.core.sites import LinearSite, Site, TransposedLinearSite
from lorakit.quant.tensor import QuantizedTensor


class LoRA(nn.Module):
    """The update s B A of one layer (arXiv 2106.09685), or s (B A x + bias) where B has a bias (PEFT's `lora_bias`).

    Where A and B began as a part of the base's weight (PiSSA, OLoRA, LoRA-GA), the update is what they have moved
    since: s (B A - B0 A0). The base is not touched for that, see ARCHITECTURE.md.

    Attributes:
        A: (r, in, *kernel) parameter, fp32 whatever the base's dtype; (experts, r, in) for stacked experts.
        B: (out, r, 1, ...) parameter, fp32; (experts, out, r) for stacked experts.
        alpha: numerator of the scale, kept for files.
        s: scale, alpha / r or alpha / sqrt(r).
        dropout: probability for elements of the input of A, while training.
        r: rank.
        bias: (out,) parameter, fp32: B's; None for most adapters, and for embeddings, attentions and experts.
        A0: where A began, frozen, if the update counts from there; else None.
        B0: where B began, likewise.
        stacked: the first dimension of A and B counts experts.
    """

    A0: torch.Tensor | None
    B0: torch.Tensor | None

    def __init__(
        self,
        A: torch.Tensor,
        B: torch.Tensor,
        *,
        alpha: float,
        s: float,
        dropout: float = 0.0,
        r: int | None = None,
        bias: torch.Tensor | None = None,
        from_start: bool = False,
        stacked: bool = False,
    ) -> None:
        super().__init__()
        self.A = nn.Parameter(A)
        self.B = nn.Parameter(B)
        self.register_buffer("A0", A.detach().clone() if from_start else None)
        self.register_buffer("B0", B.detach().clone() if from_start else None)
        self.stacked = stacked
        self.bias = None if bias is None else nn.Parameter(bias)
        self.alpha = alpha
        self.s = s
        self.dropout = dropout
        self.r = A.shape[0] if r is None else r

    @property
    def origin(self) -> LoRA:
        """The one that has the parameters: two layers with one weight may have one update."""
        return self

    def factors(self) -> tuple[torch.Tensor, torch.Tensor]:
        """The A and B whose product is the update: its own, or of twice the rank, [A; A - A0] and [B - B0, B0].

        B A - B0 A0 = (B - B0) A + B0 (A - A0): small numbers are multiplied and nothing large cancels, so that in bf16
        too the update has the accuracy of its own size, and before the first step is zero to the bit.
        """
        if self.A0 is None or self.B0 is None:
            return self.A, self.B
        return lowrank.side_by_side(self.A, self.B - self.B0, self.A - self.A0, self.B0, stacked=self.stacked)

    def forward(
        self, site: Site, layer: nn.Module, x: torch.Tensor, y: torch.Tensor, out: slice = slice(None)
    ) -> torch.Tensor:
        """The update of `y`, the layer's own output for input `x`, computed and returned in its dtype; of its features
        `out` alone, if given.
        """
        dtype = y.dtype
        if self.dropout and self.training and x.is_floating_point():  # an embedding's input are indices
            x = F.dropout(x, self.dropout)
        bias = None if self.bias is None else self.bias[out].to(dtype)
        A, B = self.factors()
        return site.up(layer, site.down(layer, x, A.to(dtype)), B[out].to(dtype), bias) * self.s

    def for_expert(self, x: torch.Tensor, A: torch.Tensor, B: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        """The update of one expert's output for the tokens `x` (n, in) sent to it; A (r, in) and B (out, r) are its."""
        if self.dropout and self.training:
            x = F.dropout(x, self.dropout)
        return F.linear(F.linear(x, A.to(dtype)), B.to(dtype)) * self.s

    def can_fuse(self, x: torch.Tensor, weight: Any) -> bool:
        """Whether `kernels.lora_linear` may compute base and update together: a frozen dense weight, no dropout."""
        return not (
            torch.compiler.is_compiling()  # fuses by itself, and cannot see into our function
            or (self.dropout and self.training)
            or (not x.is_meta and torch.is_autocast_enabled(x.device.type))  # which knows no such device
            or not isinstance(weight, nn.Parameter)
            or weight.requires_grad
            or weight.dtype != x.dtype
        )

    def fused(self, site: Site, layer: Any, x: torch.Tensor, weight: float) -> kernels.LoRAOperands | None:
        """What base and update compute with together, for a frozen dense Linear without dropout; None where that does
        not apply.
        """
        if (
            self.bias is not None  # trained, where the kernel's bias is frozen
            or not isinstance(site, LinearSite)
            or isinstance(site, TransposedLinearSite)
            or not self.can_fuse(x, layer.weight)
        ):
            return None
        return kernels.LoRAOperands(layer.weight, layer.bias, *self.factors(), self.s * weight)

    def dense(self, site: Site, weight: torch.Tensor) -> torch.Tensor:
        """The update in fp32, s B A, in the layout of the layer's `weight`."""
        A, B = self.factors()
        return site.dense(A.detach().float(), B.detach().float(), self.s)

    def extra_repr(self) -> str:
        """Rank and scale, for print(model)."""
        more = (f", dropout={self.dropout:g}" if self.dropout else "") + (", bias" if self.bias is not None else "")
        more += ", from its start" if self.A0 is not None else ""
        return f"r={self.r}, s={self.s:g}{more}"


class TokenRows(nn.Module):
    """Rows of an embedding trained whole: those of a few tokens, new ones for example.

    Attributes:
        indices: (n,) int64, the tokens.
        rows: (n, dim) parameter, fp32: the whole new rows, not a difference, so that they mean the same on a base whose
        rows of new tokens were drawn anew.
    """

    indices: torch.Tensor

    def __init__(self, indices: torch.Tensor, rows: torch.Tensor) -> None:
        super().__init__()
        self.register_buffer("indices", indices, persistent=False)
        self.rows = nn.Parameter(rows)

    def change(self, weight: torch.Tensor) -> torch.Tensor:
        """(n, dim) fp32: new rows less those of the embedding's `weight` (vocabulary, dim)."""
        return self.rows - weight[self.indices].float()

    def forward(self, site: Site, layer: nn.Module, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        """What is added to the output `y` of the embedding for token ids `x`, or of the head tied to it for states
        `x`.
        """
        change = self.change(layer.get_parameter("weight"))
        if site.kind == "embedding":
            hit = x.unsqueeze(-1) == self.indices  # (..., n), at most one each
            return site.up(layer, hit.to(y.dtype), change.T.to(y.dtype))
        logits = F.linear(x, change.to(x.dtype)).to(y.dtype)  # (..., n)
        return logits.new_zeros(*logits.shape[:-1], y.shape[-1]).index_add(-1, self.indices, logits)

    def dense(self, weight: torch.Tensor) -> torch.Tensor:
        """The change of the whole (vocabulary, dim) weight, fp32."""
        wide = torch.zeros(weight.shape, dtype=torch.float32, device=weight.device)
        return wide.index_copy(0, self.indices, self.change(weight).detach())


class LayerUpdate(nn.Module):
    """Everything one adapter changes in one layer.

    Attributes:
        lora: the low-rank update.
        bias: the whole new bias, not a difference.
        tokens: rows of an embedding; in the head tied to it, the very same module.
        lent: `tokens` are the embedding's, and stand there in files.
        prompt: a soft prompt, which the input embedding holds.
    """

    prompt: SoftPrompt | None

    def __init__(
        self,
        lora: LoRA | None = None,
        bias: torch.Tensor | None = None,
        tokens: TokenRows | None = None,
        *,
        lent: bool = False,
    ) -> None:
        super().__init__()
        self.lora = lora
        self.bias = None if bias is None else nn.Parameter(bias)
        self.tokens = tokens
        self.lent = lent
        self.prompt = None

    @property
    def low_rank_alone(self) -> LoRA | None:
        """The low-rank update if that is all."""
        return self.lora if self.bias is None and self.tokens is None else None

    @property
    def changes_bias(self) -> bool:
        """Whether, folded in, it changes the layer's bias: by another one, or by that of B."""
        return self.bias is not None or (self.lora is not None and self.lora.bias is not None)


class StackedUpdate(nn.Module):
    """Everything one adapter changes in one module whose weights are named as parameters: `updates`, by their names."""

    def __init__(self) -> None:
        super().__init__()
        self.updates = nn.ModuleDict()


class Replacement(nn.Module):
    """A whole trained copy of a module (`modules_to_save`): its parameters in fp32, its buffers as they are.

    The copy keeps the base's structure and computes in the base's dtype. With weights w_i active it is the module
    whose parameters are base + sum_i w_i (copy_i - base).
    """

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.copy = copy.deepcopy(module)
        for inner in self.copy.modules():
            for name in inner._parameters:
                weight: torch.Tensor | None = inner._parameters[name]
                if isinstance(weight, QuantizedTensor):  # trained whole, it is a plain one
                    inner._parameters[name] = nn.Parameter(weight.dense(torch.float32))
        for parameter in self.copy.parameters():
            parameter.data = parameter.data.float()
            parameter.requires_grad_(True)


def call_replaced(
    base: Mapping[str, torch.Tensor], active: Sequence[tuple[Replacement, float]], *args: Any, **kwargs: Any
) -> Any:
    """Run the module with the parameters that the active copies make together.

    Args:
        base: the module's own parameters by name.
        active: copies and their weights; at least one. The first lends its structure and its buffers.
        *args: forwarded to the module.
        **kwargs: forwarded to the module.
    """
    copies = [(dict(replacement.copy.named_parameters()), weight) for replacement, weight in active]

    def effective(name: str, own: torch.Tensor) -> torch.Tensor:
        if len(copies) == 1 and copies[0][1] == 1.0:
            return copies[0][0][name].to(own.dtype)
        wide = own.float()
        for tensors, weight in copies:
            wide = wide + weight * (tensors[name] - own.float())
        return wide.to(own.dtype)

    tensors = {name: effective(name, own) for name, own in base.items()}
    return torch.func.functional_call(active[0][0].copy, tensors, args, kwargs)


def trainable(update: LayerUpdate | Replacement) -> Iterator[tuple[str, nn.Parameter]]:
    """The trainable tensors by the names that optimisers use: A, B, B.bias, magnitude, bias (the layer's own), tokens;
    or the copy's own names. Those of a soft prompt begin with "prompt.".
    """
    if isinstance(update, Replacement):
        yield from update.copy.named_parameters()
        return
    if update.lora is not None:
        for name, parameter in update.lora.named_parameters():
            yield ("B.bias" if name == "bias" else name), parameter
    if update.bias is not None:
        yield "bias", update.bias
    if update.tokens is not None and not update.lent:
        yield "tokens", update.tokens.rows
    if update.prompt is not None:
        for name, parameter in update.prompt.named_parameters():
            yield f"prompt.{name}", parameter
