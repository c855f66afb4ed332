"""How far an adapter can be compressed before held-out rows notice. Writes no files.

A row's loss under the compressed adapter is compared with the same row's loss under the full one: most of what makes
losses vary is the row itself, and drops out. So a difference far smaller than the noise of the loss can be told.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from lorakit import models
from lorakit.adapter.compress import Truncated, compress
from lorakit.adapter.value import Adapter
from lorakit.data.chat import ChatFormat
from lorakit.data.sources import Row, read_rows
from lorakit.errors import ConfigError, DataError, NonFiniteLossError
from lorakit.evaluation import attached, encoded
from lorakit.training.objectives import losses_by_example

ENERGIES = (0.5, 0.6, 0.7, 0.8, 0.85, 0.9, 0.93, 0.95, 0.97, 0.98, 0.99, 0.995, 0.998, 0.999)
_ROUNDING = 1e-6  # of the loss: two ways of computing the same differ by this

Losses = Sequence[tuple[float, int]]  # for each row its sum of token losses and its labelled tokens


@dataclass(frozen=True, kw_only=True)
class Trial:
    """One compressed adapter, measured."""

    rank: int | None
    """What it was compressed to: the rank, or"""

    energy: float | None
    """the energy."""

    parameters: int
    relative_error: float
    loss: float
    difference: float
    """Its loss minus that of the full adapter."""

    standard_error: float
    """Of the difference, over rows."""

    within_noise: bool
    truncated: Truncated = field(repr=False)

    def to_dict(self) -> dict[str, Any]:
        """All figures, for JSON."""
        names = ("rank", "energy", "parameters", "relative_error", "loss", "difference", "standard_error")
        return {**{name: getattr(self, name) for name in names}, "within_noise": self.within_noise}


@dataclass(frozen=True, kw_only=True)
class Search:
    """What was found."""

    rows: int
    tokens: int
    loss: float
    """Of the full adapter."""

    parameters: int
    """Of the full adapter."""

    trials: tuple[Trial, ...]
    """In the order of their size."""

    best: Trial | None
    """The smallest within noise; None if there is none, and the full adapter has to stay."""

    def to_dict(self) -> dict[str, Any]:
        """All figures, for JSON."""
        return {
            "rows": self.rows,
            "tokens": self.tokens,
            "loss": self.loss,
            "parameters": self.parameters,
            "best": None if self.best is None else self.best.to_dict(),
            "trials": [trial.to_dict() for trial in self.trials],
        }


def smallest_rank(
    adapter: str | Path | Adapter,
    *,
    data: str | Path | Sequence[Row],
    model: str | tuple[Any, Any] | None = None,
    by: Literal["rank", "energy"] = "rank",
    noise: float = 2.0,
    limit: int | None = None,
    max_length: int = 1024,
    chat_template: str = "auto",
    micro_batch_tokens: int = 4096,
    dtype: str = "auto",
    device: str = "auto",
    quantize: str = "auto",
    split: str = "test",
    on_trial: Callable[[Trial], None] | None = None,
) -> Search:
    """The smallest compressed adapter whose loss on held-out rows is within noise of the full one's.

    Within noise: the difference of the losses per token is at most `noise` times its standard error, taken over rows
    in pairs (row by row, full against compressed). Sizes are tried by bisection, so the loss is taken to fall as the
    adapter grows: about log2(rank) evaluations.

    Args:
        adapter: folder, or in memory.
        data: held-out rows, or where to read them (`data.read_rows`).
        model: what `load_model` takes, or what it gave; None: the base that the adapter's folder names.
        by: rank: one rank for all layers; energy: one threshold for all singular values (`ENERGIES`).
        noise: standard errors.
        limit: take only the first rows.
        max_length: longest row, as in training.
        chat_template: see `evaluate`.
        micro_batch_tokens: tokens at once.
        dtype: of the model, if it is loaded here.
        device: of the model, if it is loaded here.
        quantize: as in `evaluate`.
        split: of a Hub data set.
        on_trial: called after each.

    Raises:
        ConfigError: a bad setting.
        DataError: rows that cannot be used, or fewer than two.
        NonFiniteLossError: the full adapter's loss is no number.
        ModelError, AdapterError, AdapterFileError, AdapterMismatchError: as in `load_model`, `compress` and `attach`.
    """
    if by not in ("rank", "energy"):
        raise ConfigError(f"by: rank or energy (got {by!r})")
    if not math.isfinite(noise) or noise < 0:
        raise ConfigError(f"noise: a number of standard errors, at least 0 (got {noise})")
    rows = (read_rows(data, split) if isinstance(data, str | Path) else list(data))[:limit]
    if len(rows) < 2:
        raise DataError(f"{len(rows)} rows: the noise of a difference shows from two rows on")
    value = adapter if isinstance(adapter, Adapter) else Adapter.load(adapter)
    sizes = _sizes(value, by)
    if model is None:
        model = models.common_base([] if isinstance(adapter, Adapter) else [adapter])
    if isinstance(model, str):
        loaded, tokenizer = models.load_model(model, dtype, device, models.agreed_storage([value], model, quantize))
    else:
        loaded, tokenizer = model
    if not isinstance(adapter, Adapter):
        tokenizer = models.tokenizer_beside(adapter, loaded, tokenizer)
    chat_format = ChatFormat(tokenizer, models.stop_ids(loaded, tokenizer), max_length, chat_template).for_rows(rows)
    examples = encoded(chat_format, rows)

    def losses(candidate: Adapter) -> Losses:
        by_row: dict[Any, tuple[float, int]] = {}
        with attached(loaded, candidate):
            each = losses_by_example(loaded, examples, micro_batch_tokens=micro_batch_tokens)
        for example, (loss, tokens) in zip(examples, each, strict=True):
            before = by_row.get(example.origin, (0.0, 0))
            by_row[example.origin] = before[0] + loss, before[1] + tokens
        return list(by_row.values())

    full = losses(value)
    if not all(math.isfinite(loss) for loss, _ in full):
        raise NonFiniteLossError(
            "the adapter's loss is NaN or infinite on some row, so nothing can be compared with it"
        )
    trials: dict[int, Trial] = {}

    def accepted(place: int) -> bool:
        trials[place] = _trial(value, losses, full, by, sizes[place], noise)
        if on_trial is not None:
            on_trial(trials[place])
        return trials[place].within_noise

    best = _first_accepted(len(sizes), accepted)
    tokens = sum(count for _, count in full)
    return Search(
        rows=len(full),
        tokens=tokens,
        loss=sum(loss for loss, _ in full) / tokens,
        parameters=value.summary()["parameters"],
        trials=tuple(trials[place] for place in sorted(trials)),
        best=None if best is None else trials[best],
    )


def _sizes(adapter: Adapter, by: str) -> list[Any]:
    """What to compress to, from small to the largest that is smaller than the adapter."""
    if by == "energy":
        return list(ENERGIES)
    step = math.lcm(*(f.rank_shares for f in adapter.factors.values()))  # of grouped convolutions
    largest = max((f.r for f in adapter.factors.values()), default=0)
    return list(range(step, largest, step))


def _trial(
    adapter: Adapter, losses: Callable[[Adapter], Losses], full: Losses, by: str, size: Any, noise: float
) -> Trial:
    truncated = compress(adapter, **{by: size})
    own = losses(truncated.adapter)
    difference, standard_error = paired_difference(own, full)
    loss = sum(loss for loss, _ in own) / sum(tokens for _, tokens in own)
    return Trial(
        rank=size if by == "rank" else None,
        energy=size if by == "energy" else None,
        parameters=truncated.adapter.summary()["parameters"],
        relative_error=truncated.relative_error,
        loss=loss,
        difference=difference,
        standard_error=standard_error,
        within_noise=difference <= max(noise * standard_error, _ROUNDING * abs(loss)),
        truncated=truncated,
    )


def paired_difference(own: Losses, full: Losses) -> tuple[float, float]:
    """Difference of two losses per token on the same rows, and its standard error (that of a ratio, over rows).

    D = sum(a_i - b_i) / sum(n_i) for sums a_i, b_i of row i and its n_i tokens; its standard error is the root of
    R / (R - 1) sum((a_i - b_i - D n_i)^2), over sum(n_i), for R rows.
    """
    tokens = sum(count for _, count in full)
    pairs = [(a - b, count) for (a, count), (b, _) in zip(own, full, strict=True)]
    difference = math.fsum(d for d, _ in pairs) / tokens
    spread = math.fsum((d - difference * count) ** 2 for d, count in pairs)
    return difference, math.sqrt(len(pairs) / (len(pairs) - 1) * spread) / tokens


def _first_accepted(count: int, accepted: Callable[[int], bool]) -> int | None:
    """The smallest place in [0, count) that is accepted, if from there on all are; None: none is. Asks for each place
    at most once, log2(count) in all.
    """
    low, high = 0, count
    while low < high:
        middle = (low + high) // 2
        if accepted(middle):
            high = middle
        else:
            low = middle + 1
    return low if low < count else None
