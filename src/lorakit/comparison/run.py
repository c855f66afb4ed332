"""A comparison: which runs, in which order, each in a process of its own, until all are done or the time is up. What is
finished stays, so a comparison that was stopped goes on where it was.
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lorakit.comparison.methods import Method, parse_method
from lorakit.comparison.summary import Row, Trial, best_rate, markdown, rows_of, write_page
from lorakit.errors import ConfigError, RunError, bullet_list
from lorakit.files import read_json, write_json, write_text
from lorakit.training.config import TrainConfig

STEPS_OF_THE_SWEEP = (1.0, 1 / 3, 3.0)  # times the method's own rate, in the order in which they are tried
_SETTINGS, _SCORES, _TABLE, _PAGE = "compare.json", "scores.json", "table.md", "compare.html"


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """What came of it.

    Attributes:
        directory: where everything is.
        rows: a line a method, the least validation loss first.
        missing: runs that were not made, and why.
        notes: what has to be said of the table.
    """

    directory: str
    rows: tuple[Row, ...]
    missing: tuple[str, ...]
    notes: tuple[str, ...]

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        return {
            "directory": self.directory,
            "methods": [row.to_dict() for row in self.rows],
            "missing": list(self.missing),
            "notes": list(self.notes),
            "page": str(Path(self.directory) / _PAGE),
        }


@dataclass(frozen=True)
class _Planned:
    method: Method
    rate: float
    seed: int

    @property
    def name(self) -> str:
        safe = "".join(c if c.isalnum() or c in "-_." else "-" for c in self.method.name)
        return f"{safe}/lr{self.rate:.3g}-seed{self.seed}"

    def __str__(self) -> str:
        return f"{self.method.name}, rate {self.rate:.2g}, seed {self.seed}"


def compare(
    settings: Mapping[str, Any],
    methods: Sequence[str],
    output: str | Path,
    *,
    rates: Sequence[float] = (),
    seeds: int = 3,
    budget: float | None = None,
    test: str | None = None,
    metrics: Sequence[str] = ("loss",),
    limit: int | None = None,
    max_new_tokens: int = 256,
    on_stage: Callable[[str], None] = lambda text: None,
) -> Comparison:
    """Run every method with its own learning-rate sweep, then the best rate of each with further seeds.

    Args:
        settings: of TrainConfig, shared by all: model, data, validation, max_steps, ...
        methods: as `parse_method` takes them.
        output: folder of the comparison; one that holds the same comparison is gone on with.
        rates: learning rates of every method's sweep; empty: a third of, once and three times its own.
        seeds: runs of each method at its best rate, seeds 0, 1, ...
        budget: seconds; a run that would probably not end in it is not begun. None: no end.
        test: rows on which each run at a best rate is measured.
        metrics: for these, as in `evaluate`.
        limit: only the first of these rows.
        max_new_tokens: of an answer.
        on_stage: told what happens.

    Raises:
        ConfigError: a setting or method is unknown or out of range.
        RunError: the folder holds another comparison, or a run failed.
    """
    begun, folder = time.monotonic(), Path(output).expanduser()
    parsed = [parse_method(method) for method in methods]
    if len({m.name for m in parsed}) < len(parsed) or not parsed:
        raise ConfigError(f"methods: name each method once, and at least one (got {', '.join(methods) or 'none'})")
    if seeds < 1:
        raise ConfigError(f"seeds: must be at least 1 (got {seeds})")
    for method in parsed:
        _config(settings, method, 1e-3, 0, folder)  # what is wrong with any of them is told before the first run
    asked = {
        "settings": dict(settings),
        "methods": [m.name for m in parsed],
        "rates": list(rates),
        "test": test,
        "metrics": list(metrics),
        "limit": limit,
        "max_new_tokens": max_new_tokens,
    }
    _begin(folder, asked)
    done: dict[_Planned, Trial] = {}
    taken: dict[_Planned, float] = {}  # seconds of the runs made now
    missing: list[str] = []

    def left() -> float | None:
        return None if budget is None else budget - (time.monotonic() - begun)

    def make(planned: _Planned, *, measured: bool) -> None:
        if not (folder / planned.name / "result.json").exists() and not _affordable(planned, taken, left()):
            missing.append(f"{planned}: the time was up")
            return
        on_stage(f"{planned}; {len(done)} done")
        start = time.monotonic()
        done[planned] = _trial(planned, settings, folder, test if measured else None, metrics, limit, max_new_tokens)
        taken[planned] = max(time.monotonic() - start, taken.get(planned, 0.0))

    for planned in _sweep(parsed, settings, rates):
        make(planned, measured=False)
    for seed in range(seeds):
        for method in parsed:
            own = [trial for planned, trial in done.items() if planned.method == method]
            if own:
                planned = _Planned(method, best_rate(own, 0), seed)
                make(planned, measured=True)
    rows = tuple(rows_of(list(done.values()), 0)) if done else ()
    notes = _notes(rows, missing, seeds)
    write_text(folder / _TABLE, markdown(rows, notes))
    write_page(folder / _PAGE, rows, notes, [(key, str(value)) for key, value in asked.items()])
    result = Comparison(directory=str(folder), rows=rows, missing=tuple(missing), notes=notes)
    write_json(folder / "result.json", result.to_dict())
    return result


def _sweep(methods: Sequence[Method], settings: Mapping[str, Any], rates: Sequence[float]) -> Iterator[_Planned]:
    """Rate by rate over all methods, so that time that runs out hits all alike."""
    if rates:
        for rate in rates:
            yield from (_Planned(method, rate, 0) for method in methods)
        return
    own = {method: _own_rate(settings, method) for method in methods}
    for factor in STEPS_OF_THE_SWEEP:
        yield from (_Planned(method, float(f"{own[method] * factor:.2g}"), 0) for method in methods)


def _own_rate(settings: Mapping[str, Any], method: Method) -> float:
    from lorakit.models import load_skeleton
    from lorakit.training.optim import default_learning_rate

    config = _config(settings, method, None, 0, Path())
    if config.learning_rate is not None:
        return config.learning_rate
    width = load_skeleton(config.model).get_input_embeddings().weight.shape[1]
    return default_learning_rate(width, full=config.method == "full")


def _config(settings: Mapping[str, Any], method: Method, rate: float | None, seed: int, output: Path) -> TrainConfig:
    own = dict(method.settings)
    sections = ("lora", "prompt")
    for name in sections if method.settings.get("method") != "full" else ():
        if name in settings:
            own[name] = {**settings[name], **own.get(name, {})}
    shared = {key: value for key, value in settings.items() if key not in sections}
    values = {**shared, **own, "seed": seed, "output": str(output)}
    if rate is not None:
        values["learning_rate"] = rate
    return TrainConfig.from_dict(values, where=f"method {method.name}")


def _begin(folder: Path, asked: Mapping[str, Any]) -> None:
    """Note what is compared; a folder that holds something else is refused."""
    path = folder / _SETTINGS
    if path.exists():
        before = read_json(path)
        differing = [
            f"{key}: then {before.get(key)!r}, now {value!r}"
            for key, value in asked.items()
            if before.get(key) != value
        ]
        if differing:
            raise RunError(
                f"{folder} holds another comparison:\n{bullet_list(differing)}\n"
                "Go on with what it was begun with, or choose another output folder."
            )
        return
    if folder.exists() and any(folder.iterdir()):
        raise RunError(f"{folder}: something else is there; choose another output folder")
    write_json(path, dict(asked))


def _affordable(planned: _Planned, taken: Mapping[_Planned, float], left: float | None) -> bool:
    """Whether a run will probably end in the time there is: as long as the longest of its method, else of any."""
    if left is None:
        return True
    own = [wall for other, wall in taken.items() if other.method == planned.method]
    return left > max(own or taken.values(), default=0.0)


def _trial(
    planned: _Planned,
    settings: Mapping[str, Any],
    folder: Path,
    test: str | None,
    metrics: Sequence[str],
    limit: int | None,
    max_new_tokens: int,
) -> Trial:
    """Train (or go on, or find what was trained) and measure."""
    place = folder / planned.name
    if not (place / "result.json").exists() or read_json(place / "result.json")["interrupted"]:
        arguments = ["train", "--resume", "--output", str(place)]
        if not (place / "run.yaml").exists():
            path = place.parent / f"{place.name}.yaml"
            config = _config(settings, planned.method, planned.rate, planned.seed, place)
            write_text(path, config.to_yaml())
            arguments = ["train", "--config", str(path)]
        _run(arguments, place)
    result = read_json(place / "result.json")
    scores: dict[str, float] = {}
    if test is not None:
        if not (place / _SCORES).exists():
            of = ["--adapter", result["adapter"]] if result["adapter"] else []
            arguments = [
                "eval",
                test,
                "--model",
                result["model"] or settings["model"],
                *of,
                "--metric",
                ",".join(metrics),
            ]
            arguments += ["--max-new-tokens", str(max_new_tokens), *(["--limit", str(limit)] if limit else [])]
            found = _run(arguments, place)["results"][0]
            write_json(place / _SCORES, {metric: found[metric] for metric in metrics})
        scores = read_json(place / _SCORES)
    return Trial(
        method=planned.method.name,
        rate=planned.rate,
        seed=planned.seed,
        loss=result["best_loss"],
        seconds=result["seconds"],
        memory=result["peak_memory"],
        trained=result["trained_parameters"],
        file=result["adapter_bytes"] or result["model_bytes"],
        scores=scores,
    )


def _run(arguments: Sequence[str], place: Path) -> dict[str, Any]:
    """A verb in a process of its own, so that its memory is its own: what it says as JSON.

    Raises:
        RunError: it failed.
    """
    with subprocess.Popen(  # noqa: S603 - our own command
        [sys.executable, "-m", "lorakit", *arguments, "--json"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        out, told = process.communicate()
    lines = [line for line in out.splitlines() if line.startswith("{")]
    result = json.loads(lines[-1]) if lines else {}
    if process.returncode or not result.get("ok"):
        raise RunError(f"{place}: lorakit {' '.join(arguments)} failed: {result.get('error') or told.strip()[-2000:]}")
    return result


def _notes(rows: Sequence[Row], missing: Sequence[str], seeds: int) -> tuple[str, ...]:
    notes = ["Rate: the best of the method's own sweep, by validation loss of seed 0; the same rows and steps for all."]
    if any(row.loss.half is not None for row in rows):
        notes.append(
            "±: 95% interval of the mean over seeds (Student's t). Seeds change the start and the order of rows."
        )
    if edges := [row.method for row in rows if row.at_edge]:
        notes.append(f"*: at the edge of what was tried ({', '.join(edges)}): a better rate may lie beyond.")
    if few := [f"{row.method} ({row.loss.number})" for row in rows if row.loss.number < seeds]:
        notes.append(f"Fewer than {seeds} seeds: {', '.join(few)}.")
    notes += [f"Not run: {each}." for each in missing]
    return tuple(notes)
