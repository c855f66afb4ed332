"""What `add_weighted_adapter` asks for, as a request to `lorakit.combine`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Self

import torch

from lorakit.adapter.combine import combine
from lorakit.adapter.value import Adapter
from lorakit.compat.peft.config import LoraConfig
from lorakit.compat.peft.errors import PeftValueError
from lorakit.errors import AdapterError

# PEFT's combination_type -> lorakit's method; see docs/compat.md for what PEFT computes instead
_COMBINATIONS = {
    "cat": "cat",
    **dict.fromkeys(("svd", "linear"), "svd"),
    **{
        f"{name}{end}": name for name in ("ties", "dare_linear", "dare_ties", "magnitude_prune") for end in ("", "_svd")
    },
}


@dataclass(frozen=True, kw_only=True)
class Request:
    """A method of `lorakit.combine` and its options.

    Attributes:
        method: its name.
        rank: of the result in every layer; None: whatever the method gives.
        density: share of elements kept, where the method thins them out.
    """

    method: str
    rank: int | None = None
    density: float | None = None

    @classmethod
    def of(
        cls,
        adapters: Sequence[str],
        configs: Sequence[LoraConfig],
        combination_type: str,
        svd_rank: int | None,
        density: float | None,
    ) -> Self:
        """What PEFT's arguments mean.

        Raises:
            PeftValueError: no adapters, an unknown type, or ranks that differ where PEFT's type takes one.
        """
        if not adapters:
            raise PeftValueError(f"Found no adapter matching the names in {list(adapters)}")
        if combination_type not in _COMBINATIONS:
            raise PeftValueError(f"Invalid combination_type: {combination_type}; there are {', '.join(_COMBINATIONS)}")
        method = "cat" if len(adapters) == 1 else _COMBINATIONS[combination_type]
        if method == "cat":
            return cls(method=method)
        ranks = [max(config.r, *config.rank_pattern.values(), 0) for config in configs]
        if len(set(ranks)) > 1 and not combination_type.endswith("svd"):
            raise PeftValueError(
                f"All adapters must have the same r value for combination_type {combination_type!r} (got {ranks}); "
                "'cat' and the types that end in 'svd' take any"
            )
        return cls(method=method, rank=svd_rank or max(ranks), density=None if method == "svd" else density)

    def combined(self, values: Sequence[Adapter], weights: Sequence[float]) -> Adapter:
        """The weighted sum.

        Raises:
            PeftValueError: it cannot be had; says why.
        """
        options: dict[str, Any] = {"rank": self.rank, "density": self.density}
        given = {name: value for name, value in options.items() if value is not None}
        try:
            result = combine(values, weights, method=self.method, **given)
        except AdapterError as error:
            raise PeftValueError(str(error)) from error
        return result if self.rank is None else _padded(result, self.rank)


def _padded(adapter: Adapter, rank: int) -> Adapter:
    """The same updates at rank `rank` in every layer, by rows and columns of zeros where a layer is too small for it:
    in PEFT, too, every layer has the rank that was asked for. The scale is 1.
    """
    factors = {}
    for path, f in adapter.folded().factors.items():
        more = rank - f.r
        if more > 0 and f.B.shape[1] == f.r:
            A = torch.cat([f.A, f.A.new_zeros(more, *f.A.shape[1:])])
            B = torch.cat([f.B, f.B.new_zeros(f.B.shape[0], more, *f.B.shape[2:])], dim=1)
            f = replace(f, A=A, B=B, alpha=float(rank))
        factors[path] = f
    config = replace(adapter.config, r=rank, alpha=float(rank), scaling="lora", rank_pattern={}, alpha_pattern={})
    return replace(adapter, config=config, factors=factors)
