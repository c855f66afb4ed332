"""The fast adapted linear layer and the plain one it must equal."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch.autograd.function import once_differentiable


class _LoRALinear(torch.autograd.Function):
    """y = x W^T + b + s (x A^T) B^T with W and b frozen; A and B may be wider in dtype than x.

    Against autograd's own graph: x is saved once and in its own dtype (no fp32 copy), and the rank-r products are added
    in place to the big ones. Only first derivatives: nothing that trains here needs more.
    """

    @staticmethod
    def forward(
        ctx: Any, x: torch.Tensor, W: torch.Tensor, b: torch.Tensor | None, A: torch.Tensor, B: torch.Tensor, s: float
    ) -> torch.Tensor:
        h = x @ A.to(x.dtype).T  # (T, r)
        ctx.save_for_backward(x, h, W, A, B)
        ctx.s = s
        return F.linear(x, W, b).addmm_(h, B.to(x.dtype).T, alpha=s)  # (T, out)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grad_outputs: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        x, h, W, A, B = ctx.saved_tensors
        g = grad_outputs[0]  # (T, out)
        g_h = (g @ B.to(x.dtype)).mul_(ctx.s)  # (T, r), the gradient of h
        grad_x = grad_A = grad_B = None
        if ctx.needs_input_grad[0]:
            grad_x = (g @ W).addmm_(g_h, A.to(x.dtype))
        if ctx.needs_input_grad[3]:
            grad_A = (g_h.T @ x).to(A.dtype)
        if ctx.needs_input_grad[4]:
            grad_B = (h.T @ g).mul_(ctx.s).to(B.dtype).T  # a thin left factor: half the time of g.T @ h
        return grad_x, None, None, grad_A, grad_B, None


def lora_linear(
    x: torch.Tensor, W: torch.Tensor, b: torch.Tensor | None, A: torch.Tensor, B: torch.Tensor, s: float
) -> torch.Tensor:
    """x W^T + b + s x A^T B^T in one autograd node.

    Args:
        x: (..., in).
        W: (out, in), frozen, of x's dtype.
        b: (out,), frozen, or None.
        A: (r, in), any floating dtype; computed with in x's, its gradient in its own.
        B: (out, r), as A.
        s: scale.

    Returns:
        (..., out) in x's dtype.
    """
    y: torch.Tensor = _LoRALinear.apply(x.reshape(-1, x.shape[-1]), W, b, A, B, s)  # type: ignore[no-untyped-call]
    return y.view(*x.shape[:-1], -1)


def lora_linear_reference(
    x: torch.Tensor, W: torch.Tensor, b: torch.Tensor | None, A: torch.Tensor, B: torch.Tensor, s: float
) -> torch.Tensor:
    """What `lora_linear` computes, by autograd."""
    return F.linear(x, W, b) + F.linear(F.linear(x, A.to(x.dtype)), B.to(x.dtype)) * s
