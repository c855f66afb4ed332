"""The arithmetic of a low-rank update: its scale and its dense form. Tensors in, tensors out."""

from __future__ import annotations

import math

import torch


def scale(alpha: float, r: int, scaling: str = "lora") -> float:
    """The factor before B A: alpha / r (LoRA, arXiv 2106.09685) or alpha / sqrt(r) (rsLoRA, arXiv 2312.03732)."""
    return alpha / math.sqrt(r) if scaling == "rslora" else alpha / r


def matrix_delta(A: torch.Tensor, B: torch.Tensor, s: float) -> torch.Tensor:
    """s B A for A (r, in), B (out, r): (out, in), in the factors' dtype."""
    return (B @ A) * s


def convolution_delta(A: torch.Tensor, B: torch.Tensor, s: float) -> torch.Tensor:
    """The convolution weight of "first A, then the 1x1 convolution B".

    Args:
        A: (r, in / groups, *kernel).
        B: (out, r / groups, 1, ...); r / groups < r means a grouped convolution: each block of outputs reads its own
        rows of A.
        s: scale.

    Returns:
        (out, in / groups, *kernel).
    """
    out, r_per_group = B.shape[:2]
    groups = A.shape[0] // r_per_group
    blocks = torch.bmm(B.reshape(groups, out // groups, r_per_group), A.reshape(groups, r_per_group, -1))
    return (blocks * s).reshape(out, *A.shape[1:])
