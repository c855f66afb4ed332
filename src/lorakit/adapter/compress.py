"""An adapter of lower rank that is as near as can be, and how near that is."""

from __future__ import annotations

import json
import math
import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, TypeVar

import torch

from lorakit.adapter.began import BEGAN
from lorakit.adapter.config import LoRAConfig
from lorakit.adapter.spectrum import decomposed, require_low_rank
from lorakit.adapter.value import Adapter, Factors
from lorakit.core import lowrank
from lorakit.errors import AdapterError, bullet_list

Number = TypeVar("Number", int, float)


@dataclass(frozen=True, kw_only=True, eq=False)
class Truncated:
    """An adapter that stands for another update, and how far it is from it.

    Attributes:
        adapter: the result.
        errors: module path -> Frobenius norm of what was left out of that layer's update.
        norms: module path -> Frobenius norm of that layer's whole update.
    """

    adapter: Adapter
    errors: Mapping[str, float]
    norms: Mapping[str, float]

    @property
    def error(self) -> float:
        """Frobenius norm of what was left out, of all layers together."""
        return math.hypot(*self.errors.values())

    @property
    def relative_error(self) -> float:
        """`error` over the Frobenius norm of the whole update; 0 where there is no update."""
        norm = math.hypot(*self.norms.values())
        return self.error / norm if norm else 0.0

    @property
    def ranks(self) -> dict[str, int]:
        """Module path -> rank."""
        return {path: f.r for path, f in self.adapter.factors.items()}

    def to_dict(self) -> dict[str, Any]:
        """All figures, for JSON."""
        return {
            **self.adapter.summary(),
            "error": self.error,
            "relative_error": self.relative_error,
            "errors": {
                path: {"rank": rank, "error": self.errors[path], "norm": self.norms[path]}
                for path, rank in self.ranks.items()
            },
        }

    def noted(self, key: str, about: Mapping[str, Any]) -> Truncated:
        """The same, with `about` and the error kept in the adapter's metadata (and so in its file) under `key`."""
        note = json.dumps({**about, "relative_error": float(f"{self.relative_error:.6g}")}, sort_keys=True)
        return replace(self, adapter=replace(self.adapter, metadata={**self.adapter.metadata, key: note}))


def compress(adapter: Adapter, *, rank: int | None = None, energy: float | None = None) -> Truncated:
    """The nearest adapter of lower rank (Eckart-Young), with scale 1 (alpha = r) and balanced factors in fp32.

    Biases, `modules_to_save` and a soft prompt stay as they are, and so does what biases of B (`lora_bias`) do; the
    error is that of the weights' updates, since nothing of those is lost.

    Args:
        adapter: any; it stays as it is.
        rank: the same for every layer (one that has less keeps what it has).
        energy: share of the squared singular values that stays, of all layers together: one threshold for all of them,
            so a layer keeps as many directions as it has above it, and at least one.

    Raises:
        AdapterError: neither or both given or out of range, or a grouped convolution that cannot have this rank.
    """
    if (rank is None) == (energy is None):
        raise AdapterError("compress: give either rank (the same for every layer) or energy (a share in (0, 1])")
    if rank is not None and rank < 1:
        raise AdapterError(f"compress: rank must be at least 1 (got {rank})")
    if energy is not None and not 0 < energy <= 1:
        raise AdapterError(f"compress: energy is a share in (0, 1] (got {energy})")
    require_low_rank(adapter, "compress")
    if not adapter.factors:
        only = "whole tensors" if adapter.prompt is None else f"a soft prompt, {adapter.prompt}"
        raise AdapterError(f"compress: this adapter holds no low-rank update, only {only}")
    ranks = dict.fromkeys(adapter.factors, rank) if rank is not None else None
    return truncated(adapter, ranks=ranks, energy=energy).noted(
        "compressed", {"rank": rank} if energy is None else {"energy": energy}
    )


def truncated(adapter: Adapter, *, ranks: Mapping[str, int] | None = None, energy: float | None = None) -> Truncated:
    """`compress`, with a rank for each layer.

    Raises:
        AdapterError: a grouped convolution cannot have the rank given for it.
    """
    values = {path: decomposed(adapter, path) for path in adapter.factors}
    if ranks is None:
        assert energy is not None
        kept = dict(zip(values, lowrank.kept_for_energy([v.S for v in values.values()], energy), strict=True))
    else:
        refuse_ranks_within_groups(adapter.factors, ranks)
        kept = {path: ranks[path] // adapter.factors[path].rank_shares for path in values}
    factors, errors, norms = {}, {}, {}
    for path, value in values.items():
        f = adapter.factors[path]
        bias = None if f.bias is None else f.bias.detach().double() * adapter.scale(path)
        factors[path] = refactored(f, *lowrank.balanced(value, kept[path]), bias)
        errors[path] = math.sqrt(lowrank.energy(value.S[..., kept[path] :]))
        norms[path] = math.sqrt(lowrank.energy(value.S))
    return Truncated(adapter=with_factors(adapter, factors), errors=errors, norms=norms)


def refuse_ranks_within_groups(factors: Mapping[str, Factors], ranks: Mapping[str, int]) -> None:
    """A grouped convolution has the same rank in every group.

    Raises:
        AdapterError: one would not.
    """
    problems = []
    for path, f in factors.items():
        groups = f.rank_shares
        if ranks[path] % groups:
            problems.append(f"{path}: a convolution with {groups} groups needs a rank divisible by {groups}")
    if problems:
        raise AdapterError(
            f"cannot be given this rank:\n{bullet_list(problems)}\nChoose a rank that all can have, or an energy."
        )


def refactored(like: Factors, A: torch.Tensor, B: torch.Tensor, bias: torch.Tensor | None) -> Factors:
    """Stacks of factors, and B's bias, with scale 1 as the factors of a layer like `like`, in fp32 (fp64 if it is
    so).
    """
    stacked = like.kind == "experts"
    A, B = (A, B) if stacked else lowrank.unblocked(A, B, like.A, like.B)
    made = replace(like, A=A.contiguous(), B=B.contiguous(), bias=bias, alpha=float(A.shape[1 if stacked else 0]))
    return made.to(torch.float64 if like.A.dtype == torch.float64 else torch.float32)


def with_factors(adapter: Adapter, factors: Mapping[str, Factors], **changes: Any) -> Adapter:
    """The adapter with other factors for its layers, each with its own rank and alpha, and a config that says so.

    Args:
        adapter: lends all else.
        factors: alpha = r, which makes the scale 1.
        **changes: to further fields of the config.
    """
    metadata = {key: value for key, value in adapter.metadata.items() if key != BEGAN}  # the halves are no more
    config = _config_of(adapter.config, factors, **changes)
    return replace(adapter, config=config, factors=dict(factors), metadata=metadata)


def _config_of(config: LoRAConfig, factors: Mapping[str, Factors], **changes: Any) -> LoRAConfig:
    ranks = {path: f.r for path, f in factors.items()}
    r = Counter(ranks.values()).most_common(1)[0][0] if ranks else config.r
    pattern = exact_pattern(ranks, r)
    return replace(
        config,
        r=r,
        alpha=float(r),
        scaling="lora",
        rank_pattern=pattern,
        alpha_pattern={key: float(rank) for key, rank in pattern.items()},
        **changes,
    )


def exact_pattern(ranks: Mapping[str, Number], default: Number) -> dict[str, Number]:
    """A rank_pattern (or alpha_pattern) of whole paths that gives each layer its own.

    The first pattern that matches the end of a path counts, and a path may be the end of another ("out" of "net.out"):
    longer ones come first, and have a pattern if such an end has, or the attention they are in.
    """
    others = {path for path, rank in ranks.items() if rank != default}
    ends = [path for path in ranks if any(path.endswith(f".{end}") for end in others)]
    told = [path for path in ranks if path in others or path in ends or path.rpartition(".")[0] in others]
    return {re.escape(path): ranks[path] for path in sorted(told, key=lambda path: (-path.count("."), path))}
