"""Fast forms of what a training step does most, each one autograd node, beside the plain form it must equal.

First derivatives only, and none for what is frozen: nothing that trains here needs more.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch.autograd.function import once_differentiable

from lorakit.core import products
from lorakit.core.int8 import Int8Weight


class _LoRALinears(torch.autograd.Function):
    """y_i = x W_i^T + b_i + s_i (x A_i^T) B_i^T for layers given the same x, with W and b frozen; A and B may be wider
    in dtype than x. With a mask, (T, 1), its tokens alone have the update: m * (x A^T) goes on in place of x A^T.

    Against autograd's own graph: x is saved once and in its own dtype (no fp32 copy), and not at all where no A is
    trained, the rank-r products are added in place to the big ones, and all A_i meet x (and its gradient) as one
    matrix. How a W_i multiplies `core.products` decides.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: torch.Tensor,
        scales: tuple[float, ...],
        copies: products.Copies,
        masks: tuple[torch.Tensor | None, ...],
        *tensors: Any,
    ) -> tuple[torch.Tensor, ...]:
        W, b, A, B = (tensors[i::4] for i in range(4))  # b's may be None
        h = x @ _stacked(A, x.dtype).T  # (T, R), R the sum of ranks
        ranks = [len(A_i) for A_i in A]
        _mask(torch.split(h, ranks, dim=1), masks)
        keeps_x = any(ctx.needs_input_grad[6::4])  # for the gradient of A alone
        ctx.save_for_backward(x if keeps_x else None, h, *W, *A, *B)
        ctx.scales, ctx.copies, ctx.masks = scales, copies, masks
        outputs = products.forwards(x, W, b, copies)
        return tuple(
            y_i.addmm_(h_i, B_i.to(x.dtype).T, alpha=s)  # (T, out_i)
            for y_i, h_i, B_i, s in zip(outputs, torch.split(h, ranks, dim=1), B, scales, strict=True)
        )

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grad_outputs: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        x, h, *rest = ctx.saved_tensors
        n = len(ctx.scales)
        W, A, B = rest[:n], rest[n : 2 * n], rest[2 * n :]
        ranks = [len(A_i) for A_i in A]
        parts = [(g @ B_i.to(h.dtype)).mul_(s) for g, B_i, s in zip(grad_outputs, B, ctx.scales, strict=True)]
        _mask(parts, ctx.masks)
        g_h = parts[0] if n == 1 else torch.cat(parts, dim=1)  # (T, R), the gradient of h
        grad_x = grad_A = None
        if ctx.needs_input_grad[0]:
            grad_x = products.backwards(grad_outputs, W, ctx.copies)
            grad_x.addmm_(g_h, _stacked(A, h.dtype))
        if any(ctx.needs_input_grad[6::4]):
            grad_A = torch.split(g_h.T @ x, ranks)
        grads: list[torch.Tensor | None] = [grad_x, None, None, None]
        for i, (g, h_i, s) in enumerate(zip(grad_outputs, torch.split(h, ranks, dim=1), ctx.scales, strict=True)):
            needs_A, needs_B = ctx.needs_input_grad[6 + 4 * i : 8 + 4 * i]
            grads += [None, None, grad_A[i].to(A[i].dtype) if needs_A and grad_A is not None else None]
            # a thin left factor: half the time of g.T @ h
            grads.append((h_i.T @ g).mul_(s).to(B[i].dtype).T if needs_B else None)
        return tuple(grads)


def _mask(parts: Sequence[torch.Tensor], masks: Sequence[torch.Tensor | None]) -> None:
    for part, mask in zip(parts, masks, strict=True):
        if mask is not None:
            part.mul_(mask)


def _stacked(A: Sequence[torch.Tensor], dtype: torch.dtype) -> torch.Tensor:
    matrices = [matrix.to(dtype) for matrix in A]
    return matrices[0] if len(matrices) == 1 else torch.cat(matrices)


class LoRAOperands(NamedTuple):
    """What one layer computes with: x W^T + b + s x A^T B^T, or gain (x W^T + s x A^T B^T) + b.

    Attributes:
        W: (out, in), frozen, of x's dtype.
        b: (out,), frozen, or None.
        A: (r, in), any floating dtype; computed with in x's, its gradient in its own.
        B: (out, r), as A.
        s: scale.
        gain: (out,), any floating dtype, may have a gradient; None: 1.
        copy: of W in integers, by which it multiplies; None: exactly.
        mask: (..., 1) of x's dtype, 1 for tokens that have the update and 0 for the others; None: all have it.
    """

    W: torch.Tensor
    b: torch.Tensor | None
    A: torch.Tensor
    B: torch.Tensor
    s: float
    gain: torch.Tensor | None = None
    copy: Int8Weight | None = None
    mask: torch.Tensor | None = None

    @property
    def flat_mask(self) -> torch.Tensor | None:
        """The mask for tokens in one line, (T, 1)."""
        return None if self.mask is None else self.mask.reshape(-1, 1)

    @property
    def inner_bias(self) -> torch.Tensor | None:
        """The bias that is added before a gain: none where there is one."""
        return self.b if self.gain is None else None

    def finished(self, y: torch.Tensor) -> torch.Tensor:
        """What is computed without gain, with it."""
        if self.gain is None:
            return y
        gain = self.gain.to(y.dtype)
        return y * gain if self.b is None else torch.addcmul(self.b, y, gain)


def lora_linears(x: torch.Tensor, layers: Sequence[LoRAOperands]) -> tuple[torch.Tensor, ...]:
    """Every layer's x W^T + b + s x A^T B^T in one autograd node; gains follow it.

    Args:
        x: (..., in), which all of them are given.
        layers: at least one.

    Returns:
        (..., out) of each, in x's dtype.
    """
    flat = x.reshape(-1, x.shape[-1])
    scales, copies = tuple(layer.s for layer in layers), tuple(layer.copy for layer in layers)
    masks = tuple(layer.flat_mask for layer in layers)
    tensors = [tensor for layer in layers for tensor in (layer.W, layer.inner_bias, layer.A, layer.B)]
    results: tuple[torch.Tensor, ...] = _LoRALinears.apply(flat, scales, copies, masks, *tensors)  # type: ignore[no-untyped-call]
    return tuple(layer.finished(y).view(*x.shape[:-1], -1) for layer, y in zip(layers, results, strict=True))


def lora_linear(x: torch.Tensor, layer: LoRAOperands) -> torch.Tensor:
    """`lora_linears` of one layer.

    Args:
        x: (..., in).
        layer: what it computes with.

    Returns:
        (..., out) in x's dtype.
    """
    if not torch.is_grad_enabled():  # calling the function costs more than the products of a single token
        flat = x.reshape(-1, x.shape[-1])
        h = flat @ layer.A.to(x.dtype).T
        _mask([h], [layer.flat_mask])
        (y,) = products.forwards(flat, [layer.W], [layer.inner_bias], [layer.copy])
        return layer.finished(y.addmm_(h, layer.B.to(x.dtype).T, alpha=layer.s)).view(*x.shape[:-1], -1)
    return lora_linears(x, [layer])[0]


def lora_linear_reference(x: torch.Tensor, layer: LoRAOperands) -> torch.Tensor:
    """What `lora_linear` computes with an exact product, by autograd."""
    W, b, A, B, s, gain, _, mask = layer
    update = F.linear(F.linear(x, A.to(x.dtype)), B.to(x.dtype)) * s
    y = F.linear(x, W) + (update if mask is None else update * mask)
    y = y if gain is None else y * gain.to(x.dtype)
    return y if b is None else y + b


class _RMSNorm(torch.autograd.Function):
    """y = w * (x / rms(x)), in fp32 inside. Keeps x and one number a row where autograd keeps four tensors like x."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, w: torch.Tensor, eps: float) -> torch.Tensor:
        wide = x.float()  # (..., d)
        mean_square = torch.linalg.vector_norm(wide, dim=-1, keepdim=True).square_().div_(x.shape[-1])
        inverse = mean_square.add_(eps).rsqrt_()  # (..., 1)
        ctx.save_for_backward(x, w, inverse)
        y: torch.Tensor = (wide * inverse).to(x.dtype).mul_(w)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grad_outputs: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        x, w, inverse = ctx.saved_tensors
        wide = x.float()
        g = (grad_outputs[0] * w).float()  # of x / rms(x)
        along = torch.linalg.vecdot(g, wide).unsqueeze(-1)  # (..., 1)
        along.mul_(inverse.pow(3)).div_(x.shape[-1])
        return g.mul_(inverse).addcmul_(wide, along, value=-1).to(x.dtype), None, None


def rms_norm(x: torch.Tensor, w: torch.Tensor, eps: float) -> torch.Tensor:
    """RMS normalisation (arXiv 1910.07467) with a frozen weight, rounded as transformers' Llama does it.

    Args:
        x: (..., d).
        w: (d,), of x's dtype.
        eps: added to the mean square.
    """
    y: torch.Tensor = _RMSNorm.apply(x, w, eps)  # type: ignore[no-untyped-call]
    return y


def rms_norm_reference(x: torch.Tensor, w: torch.Tensor, eps: float) -> torch.Tensor:
    """What `rms_norm` computes, by autograd."""
    wide = x.float()
    return w * (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)).to(x.dtype)


class _SwiGLU(torch.autograd.Function):
    """silu(gate) * up. Keeps its two inputs; silu(gate) is computed again."""

    @staticmethod
    def forward(ctx: Any, gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(gate, up)
        return F.silu(gate).mul_(up)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grad_outputs: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        gate, up = ctx.saved_tensors
        g = grad_outputs[0]
        return torch.ops.aten.silu_backward(g * up, gate), F.silu(gate).mul_(g)


def swiglu(gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    """silu(gate) * up (arXiv 2002.05202), for tensors of one shape and dtype."""
    y: torch.Tensor = _SwiGLU.apply(gate, up)  # type: ignore[no-untyped-call]
    return y


def swiglu_reference(gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    """What `swiglu` computes, by autograd."""
    return F.silu(gate) * up


def _rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, *, back: bool) -> torch.Tensor:
    half = x.shape[-1] // 2
    y = x * cos
    first, second = sin[..., :half], sin[..., half:]
    if back:  # the transposed matrix
        first, second = -second, -first
    y[..., :half].addcmul_(x[..., half:], first, value=-1)
    y[..., half:].addcmul_(x[..., :half], second)
    return y


class _Rotary(torch.autograd.Function):
    """Keeps only cos and sin; autograd's form of the same makes and cuts the rotated halves anew."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(cos, sin)
        return _rotate(x, cos, sin, back=False)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grad_outputs: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        cos, sin = ctx.saved_tensors
        return _rotate(grad_outputs[0], cos, sin, back=True), None, None


def rotary(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Rotary position embedding (arXiv 2104.09864) in the half-split form: x cos + (-x_2, x_1) sin.

    Args:
        x: (..., T, D), D even.
        cos: broadcastable to x.
        sin: as `cos`.
    """
    y: torch.Tensor = _Rotary.apply(x, cos, sin)  # type: ignore[no-untyped-call]
    return y


def rotary_reference(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """What `rotary` computes, by autograd."""
    first, second = x.chunk(2, dim=-1)
    return x * cos + torch.cat((-second, first), dim=-1) * sin
