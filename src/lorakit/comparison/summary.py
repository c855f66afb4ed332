"""What the runs of a comparison say: the best rate of each method, means over seeds with intervals, as words, table and
page. Pure functions of the trials' figures.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from lorakit.report import Curve, chart, count, duration, rendered, size

# two-sided 95% of Student's t by degrees of freedom; beyond, the normal's
_T = (12.71, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262)


@dataclass(frozen=True, kw_only=True)
class Trial:
    """One run of a comparison, finished.

    Attributes:
        method: its name.
        rate: learning rate.
        seed: of the run.
        loss: best validation loss.
        seconds: of its steps.
        memory: most bytes that the process held.
        trained: numbers trained.
        file: bytes of what was saved.
        scores: metric -> value on the test rows; empty where it was not measured.
    """

    method: str
    rate: float
    seed: int
    loss: float
    seconds: float
    memory: int
    trained: int
    file: int
    scores: Mapping[str, float]


@dataclass(frozen=True)
class Mean:
    """A mean over seeds.

    Attributes:
        value: of it.
        half: half the width of its 95% interval (Student's t); None for one seed.
        number: of seeds.
    """

    value: float
    half: float | None
    number: int

    @classmethod
    def of(cls, values: Sequence[float]) -> Mean:
        """Of at least one value."""
        n = len(values)
        if n == 1:
            return cls(values[0], None, 1)
        t = _T[n - 2] if n - 2 < len(_T) else 1.96
        return cls(statistics.fmean(values), t * statistics.stdev(values) / math.sqrt(n), n)

    def words(self, digits: int) -> str:
        """`0.973 ± 0.012`, or the bare value where there is no interval."""
        return f"{self.value:.{digits}f}" + (f" ± {self.half:.{digits}f}" if self.half is not None else "")


@dataclass(frozen=True, kw_only=True)
class Row:
    """A method's line of the table.

    Attributes:
        method: its name.
        rate: the learning rate with the least validation loss in the sweep.
        at_edge: whether that was the largest or smallest one tried, so that a better one may lie beyond.
        sweep: learning rate -> validation loss, of the first seed.
        loss: validation loss over seeds, at that rate.
        scores: metric -> mean over seeds on the test rows.
        seconds: of the steps.
        memory: most bytes.
        trained: numbers trained.
        file: bytes of what was saved.
    """

    method: str
    rate: float
    at_edge: bool
    sweep: Mapping[float, float]
    loss: Mean
    scores: Mapping[str, Mean]
    seconds: Mean
    memory: int
    trained: int
    file: int

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        return {**asdict(self), "sweep": {f"{rate:g}": loss for rate, loss in self.sweep.items()}}


def best_rate(trials: Sequence[Trial], first_seed: int) -> float:
    """The rate with the least validation loss among a method's trials of the first seed."""
    return min((trial for trial in trials if trial.seed == first_seed), key=lambda trial: trial.loss).rate


def rows_of(trials: Sequence[Trial], first_seed: int) -> list[Row]:
    """A line a method, the least loss first."""
    by_method: dict[str, list[Trial]] = {}
    for trial in trials:
        by_method.setdefault(trial.method, []).append(trial)
    rows = []
    for method, own in by_method.items():
        rate = best_rate(own, first_seed)
        sweep = {t.rate: t.loss for t in sorted(own, key=lambda t: t.rate) if t.seed == first_seed}
        chosen = [trial for trial in own if trial.rate == rate]
        metrics = [m for m in chosen[0].scores if all(m in trial.scores for trial in chosen)]
        rows.append(
            Row(
                method=method,
                rate=rate,
                at_edge=len(sweep) > 1 and rate in (min(sweep), max(sweep)),
                sweep=sweep,
                loss=Mean.of([trial.loss for trial in chosen]),
                scores={m: Mean.of([trial.scores[m] for trial in chosen]) for m in metrics},
                seconds=Mean.of([trial.seconds for trial in chosen]),
                memory=max(trial.memory for trial in chosen),
                trained=chosen[0].trained,
                file=chosen[0].file,
            )
        )
    return sorted(rows, key=lambda row: row.loss.value)


_DIGITS = {"loss": 3, "bleu": 2}


def table(rows: Sequence[Row]) -> list[list[str]]:
    """Heading and lines, as words."""
    metrics = list(dict.fromkeys(metric for row in rows for metric in row.scores))
    heading = [
        "method",
        "rate",
        "valid loss",
        *(f"test {m}" for m in metrics),
        "seeds",
        "steps",
        "memory",
        "trained",
        "file",
    ]
    lines = [
        [
            row.method,
            f"{row.rate:.2g}" + ("*" if row.at_edge else ""),
            row.loss.words(3),
            *(row.scores[m].words(_DIGITS.get(m, 3)) if m in row.scores else "" for m in metrics),
            str(row.loss.number),
            duration(row.seconds.value),
            size(row.memory),
            count(row.trained),
            size(row.file),
        ]
        for row in rows
    ]
    return [heading, *lines]


def markdown(rows: Sequence[Row], notes: Sequence[str]) -> str:
    """The table as Markdown, with what has to be said of it below."""
    heading, *lines = table(rows)
    text = [f"| {' | '.join(cells)} |" for cells in (heading, ["---"] * len(heading), *lines)]
    return "\n".join([*text, "", *notes, ""])


def write_page(path: Path, rows: Sequence[Row], notes: Sequence[str], about: Sequence[tuple[str, str]]) -> None:
    """The comparison as one self-contained HTML page."""
    from lorakit.files import write_text

    heading, *lines = table(rows)
    page = {
        "heading": heading,
        "lines": lines,
        "notes": notes,
        "about": about,
        "sweep": _sweep_chart(rows),
        "methods": [row.method for row in rows],
    }
    write_text(path, rendered("compare.html.jinja", page))


def _sweep_chart(rows: Sequence[Row]) -> Any:
    curves = [
        Curve([(math.log2(rate), loss) for rate, loss in row.sweep.items()], f"line{i % 8}", marked=True)
        for i, row in enumerate(rows)
    ]
    words = "; ".join(
        f"{row.method}: {', '.join(f'{loss:.3f} at {rate:.2g}' for rate, loss in row.sweep.items())}" for row in rows
    )
    return chart("sweep", "Validation loss by learning rate", words, curves, x_label="log2 of the learning rate")
