"""The layers of LyCORIS files as low-rank factors, exactly: LoCon, LoHa (arXiv 2108.06098) and LoKr, whose tensors are
named `lora_*`, `hada_*` and `lokr_*`, of linear layers and convolutions, with and without a Tucker core. Tensors in,
factors out; knows no files and no layer names.

A "pair" is (B (out, r), A (r, in, *kernel)), whose product is the update of a weight (out, in, *kernel).
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch

from lorakit.adapter.value import Factors
from lorakit.errors import AdapterFileError
from lorakit.formats.assembly import factors_of, fitted

Parts = Mapping[str, torch.Tensor]
Pair = tuple[torch.Tensor, torch.Tensor]

# prefix of the tensors' names -> what the method is called; each name there is of a tensor, with alpha besides
_METHODS = {"lora": "LoRA", "hada": "LoHa", "lokr": "LoKr"}
_NAMES = {
    *("lora_down.weight", "lora_up.weight", "lora_mid.weight"),
    *("hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b", "hada_t1", "hada_t2"),
    *("lokr_w1", "lokr_w1_a", "lokr_w1_b", "lokr_w2", "lokr_w2_a", "lokr_w2_b", "lokr_t2"),
}
# first word of a tensor's name -> what it belongs to, for the message
_OTHERS = {
    "dora_scale": "DoRA: the update is not low-rank by itself",
    "oft_blocks": "OFT, which rotates the weight",
    "oft_diag": "OFT, which rotates the weight",
    "on_input": "(IA)^3, which scales activations",
    "diff": "a whole difference of the weight",
    "diff_b": "a trained bias",
    "w_norm": "a trained norm",
    "b_norm": "a trained norm",
    "a1": "GLoRA",
}


def expand(parts: Parts, shape: tuple[int, ...]) -> Factors:
    """The update of one layer as factors with the same dense product, in the rank that this takes.

    The rank is r of a LoRA, r^2 of a LoHa, the product of the two halves' ranks of a LoKr; never more than the smaller
    side of the weight.

    Args:
        parts: tensors by the part of their name behind the layer's.
        shape: of the layer's weight: (out, in, *kernel).

    Raises:
        AdapterFileError: a tensor is missing, not understood, or of a wrong shape.
    """
    unknown = [name for name in parts if name not in _NAMES and name != "alpha"]
    if unknown:
        what = _OTHERS.get(unknown[0].split(".")[0])
        raise AdapterFileError(f"{', '.join(unknown)}: " + (what or "no tensor of LoRA, LoHa or LoKr"))
    methods = {name.split("_")[0] for name in parts} - {"alpha"}
    if len(methods) != 1:
        found = " and ".join(_METHODS[method] for method in sorted(methods))
        raise AdapterFileError(f"holds tensors of {found}" if found else "holds nothing but alpha")
    method = methods.pop()
    try:
        (B, A), r = {"lora": _lora, "hada": _hada, "lokr": _lokr}[method](parts, shape)
    except (RuntimeError, IndexError) as error:  # of torch: shapes whose product does not exist
        shapes = ", ".join(f"{name} {tuple(t.shape)}" for name, t in parts.items())
        raise AdapterFileError(f"{shapes} make no update of a weight {shape}") from error
    A, B = fitted(A, B, shape)
    return factors_of(A, B, 1.0 if r is None else scale(parts.get("alpha"), r))


def scale(alpha: torch.Tensor | None, r: int) -> float:
    """alpha / r; 1 where there is no alpha, as every reader has it.

    Raises:
        AdapterFileError: it is no positive number. (Of zero readers make 0, or 1.)
    """
    if alpha is None:
        return 1.0
    value = float(alpha) if alpha.numel() == 1 else math.nan
    if not 0 < value < math.inf:
        raise AdapterFileError(f"its alpha is {alpha.tolist() if alpha.numel() < 9 else tuple(alpha.shape)}")
    return value / r


def _need(parts: Parts, name: str) -> torch.Tensor:
    if name not in parts:
        raise AdapterFileError(f"{name} is missing")
    return parts[name]


def _lora(parts: Parts, shape: tuple[int, ...]) -> tuple[Pair, int]:
    """LoRA and LoCon; a core `lora_mid` (r, r, *kernel) between two convolutions of one pixel goes into A."""
    A, B = _need(parts, "lora_down.weight"), _need(parts, "lora_up.weight")
    if "lora_mid.weight" in parts:
        return _with_core(parts["lora_mid.weight"], B.flatten(1), A.flatten(1)), A.shape[0]
    return (B, A), A.shape[0]


def _hada(parts: Parts, shape: tuple[int, ...]) -> tuple[Pair, int]:
    """(B1 A1) * (B2 A2), elementwise: its rows are products of rows, so the pairs' Khatri-Rao products make it."""
    halves = [_hada_half(parts, number, shape) for number in (1, 2)]
    (B1, A1), (B2, A2) = halves
    r = A1.shape[0]
    if r * A2.shape[0] >= _full_rank(shape):
        return _whole((B1 @ A1.flatten(1) * (B2 @ A2.flatten(1))).reshape(shape)), r
    B = torch.einsum("oi,oj->oij", B1, B2).flatten(1)
    A = torch.einsum("i...,j...->ij...", A1, A2).flatten(0, 1)
    return (B, A), r


def _hada_half(parts: Parts, number: int, shape: tuple[int, ...]) -> Pair:
    a, b = (_need(parts, f"hada_w{number}_{letter}").float() for letter in "ab")
    core = parts.get(f"hada_t{number}")
    if (core is None) != ("hada_t1" not in parts and "hada_t2" not in parts):
        raise AdapterFileError(f"hada_t{number} is missing")
    if core is not None:
        return _with_core(core.float(), a.T, b)
    return _pair(a, b.reshape(b.shape[0], *shape[1:]))


def _lokr(parts: Parts, shape: tuple[int, ...]) -> tuple[Pair, int | None]:
    """The Kronecker product of two halves, (out1, in1) and (out2, in2, *kernel); that of pairs is one of pairs.

    Returns:
        (pair, rank by which alpha is divided; None where neither half is factored, whose alpha counts for nothing)
    """
    (B1, A1), r1 = _lokr_half(parts, 1, ())
    (B2, A2), r2 = _lokr_half(parts, 2, shape[2:])
    r = r1 if r1 is not None else r2
    if (B1.shape[0] * B2.shape[0], A1.shape[1] * A2.shape[1]) != shape[:2]:
        raise AdapterFileError(
            f"its halves {(B1.shape[0], A1.shape[1])} and {(B2.shape[0], A2.shape[1])} make no weight {shape}"
        )
    if A1.shape[0] * A2.shape[0] >= _full_rank(shape):
        first, second = B1 @ A1, (B2 @ A2.flatten(1)).reshape(B2.shape[0], *A2.shape[1:])
        return _whole(_kron(first, second)), r
    return (_kron(B1, B2), _kron(A1, A2)), r


def _lokr_half(parts: Parts, number: int, kernel: tuple[int, ...]) -> tuple[Pair, int | None]:
    name = f"lokr_w{number}"
    if name in parts:
        if {f"{name}_a", f"{name}_b", f"lokr_t{number}"} & parts.keys():
            raise AdapterFileError(f"{name} is given whole and in factors")
        whole = parts[name].float()
        return _whole(whole if whole.ndim > 2 else whole.reshape(*whole.shape, *(1 for _ in kernel))), None
    if f"{name}_a" not in parts and f"{name}_b" not in parts:
        raise AdapterFileError(f"{name} is missing")
    a, b = (_need(parts, f"{name}_{letter}").float() for letter in "ab")
    if number == 2 and "lokr_t2" in parts:
        return _with_core(parts["lokr_t2"].float(), a.T, b), b.shape[0]
    return _pair(a, b.reshape(b.shape[0], -1, *kernel)), b.shape[0]


def _with_core(core: torch.Tensor, B: torch.Tensor, A: torch.Tensor) -> Pair:
    """The pair of a Tucker decomposition: sum over i and j of B[:, i] core[i, j, *kernel] A[j]."""
    return _pair(B, torch.einsum("ij...,jn->in...", core.to(A), A))


def _pair(B: torch.Tensor, A: torch.Tensor) -> Pair:
    if B.ndim != 2 or B.shape[1] != A.shape[0]:
        raise AdapterFileError(f"factors {tuple(B.shape)} and {tuple(A.shape)} do not belong together")
    return B, A


def _whole(weight: torch.Tensor) -> Pair:
    """A pair whose product is this very weight (out, in, *kernel): itself and an identity, whichever is smaller."""
    out, inputs = weight.shape[0], weight[0].numel()
    if out <= inputs:
        return torch.eye(out), weight
    return weight.flatten(1), torch.eye(inputs).reshape(inputs, *weight.shape[1:])


def _full_rank(shape: tuple[int, ...]) -> int:
    return min(shape[0], math.prod(shape[1:]))


def _kron(first: torch.Tensor, second: torch.Tensor) -> torch.Tensor:
    """Kronecker product over the first two dimensions; the kernel is the second's."""
    one_pixel = first.reshape(*first.shape, *(1 for _ in second.shape[2:]))
    return torch.kron(one_pixel.contiguous(), second.contiguous())  # torch makes views of them
