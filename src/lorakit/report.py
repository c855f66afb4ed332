"""A run folder as one self-contained HTML page: no script, no outside resource, light and dark, phone and desk.

A pure function of the folder's files (`run.yaml`, `metrics.jsonl`, `data.json`, `samples.json`, `result.json`); knows
not how the run came about.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lorakit.config import read_yaml
from lorakit.files import JsonLines, read_json, write_text

# Units of the drawing. On a phone one unit is a little under one CSS pixel, so text of 14 units stays readable.
_WIDTH, _HEIGHT = 420, 230
_LEFT, _RIGHT, _TOP, _BOTTOM = 54, 14, 10, 40
_MOST_POINTS = 400  # per curve; more cannot be seen and make the file big


@dataclass(frozen=True)
class Curve:
    """A line of a chart: (x, y) points, CSS classes, and whether its points are marked."""

    points: Sequence[tuple[float, float]]
    classes: str
    marked: bool = False


def write_report(run_dir: str | Path) -> Path:
    """Write `report.html` into a run folder.

    Args:
        run_dir: a run folder, finished or interrupted.

    Returns:
        The path of the page.

    Raises:
        ConfigError: `run.yaml` cannot be read.
        FileError: another of the files cannot be read, or the page cannot be written.
    """
    run_dir = Path(run_dir)
    page = run_dir / "report.html"
    write_text(page, rendered("report.html.jinja", _contents(run_dir)))
    return page


def rendered(template: str, contents: Mapping[str, Any]) -> str:
    """A page from one of our templates; what `contents` say is escaped, drawings (`Markup`) are not."""
    from jinja2 import Environment, PackageLoader, StrictUndefined

    environment = Environment(loader=PackageLoader("lorakit"), autoescape=True, undefined=StrictUndefined)
    return environment.get_template(template).render(contents)


def _contents(run_dir: Path) -> dict[str, Any]:
    """Everything the template shows, as words and drawings."""
    settings = read_yaml(run_dir / "run.yaml")
    result, data = read_json(run_dir / "result.json"), read_json(run_dir / "data.json")
    samples = read_json(run_dir / "samples.json") if (run_dir / "samples.json").exists() else []
    rows = JsonLines(run_dir / "metrics.jsonl").rows()
    steps = [row for row in rows if "loss" in row]
    evaluations = [row for row in rows if "eval_loss" in row]
    return {
        "name": run_dir.resolve().name,
        "subtitle": f"{_name(settings['model'])} on {_name(settings['data'])}, lorakit {result['lorakit_version']}",
        "warnings": _warnings(run_dir, result),
        "tiles": _tiles(result),
        "loss_chart": _loss_chart(steps, evaluations, result["best_step"]),
        "rate_chart": _rate_chart(steps),
        "evaluations": evaluations,
        "best_step": result["best_step"],
        "samples": samples,
        "tables": [(f"Data: {name}", _flat(statistics)) for name, statistics in data.items()]
        + [("Settings", _flat(settings))],
        "adapter": run_dir / "best" if result["best_step"] else None,
    }


def _warnings(run_dir: Path, result: Mapping[str, Any]) -> list[str]:
    found = []
    if result["interrupted"]:
        where = f"step {result['step']} of {result['total_steps']}"
        found.append(f"Interrupted at {where}. lorakit train --resume --output {run_dir} goes on exactly there.")
    before, after = result["initial_loss"], result["best_loss"]
    if before is not None and after is not None and after >= before:
        found.append("The adapter is no better than the base model on the validation rows.")
    return found


def _tiles(result: Mapping[str, Any]) -> list[dict[str, str]]:
    best = f"base model → best, step {result['best_step']} of {result['total_steps']}"
    tiles = [
        {
            "label": "Validation loss",
            "value": f"{_loss(result['initial_loss'])} → {_loss(result['best_loss'])}",
            "detail": best if result["best_step"] else "",
        },
        {
            "label": "Trained parameters",
            "value": count(result["trained_parameters"]),
            "detail": f"{result['trained_parameters'] / result['parameters']:.2%} of {count(result['parameters'])}",
        },
    ]
    if result["adapter_bytes"] is not None:
        tiles.append({"label": "Adapter file", "value": size(result["adapter_bytes"]), "detail": "safetensors, fp32"})
    if result["model_bytes"] is not None:
        tiles.append({"label": "Model file", "value": size(result["model_bytes"]), "detail": "safetensors, fp32"})
    if result["seconds"] > 0:
        speed = result["tokens"] / result["seconds"]
        held = "" if result["storage"] == "none" else f", weights in {result['storage']}"
        where = f"{result['device']}, {result['dtype']}{held}"
        tiles.append({"label": "Speed", "value": f"{speed:,.0f} tokens/s", "detail": where})
        if result["peak_memory"] is not None:
            tiles.append({"label": "Peak memory", "value": size(result["peak_memory"]), "detail": "of the process"})
        tiles.append(
            {"label": "Training time", "value": duration(result["seconds"]), "detail": f"{result['tokens']:,} tokens"}
        )
    return tiles


def _name(place: str) -> str:
    """The last part of a path; a Hub id or alias whole."""
    return Path(place).name if Path(place).is_absolute() else place


def _loss(value: float | None) -> str:
    return "–" if value is None else f"{value:.3f}"


def count(number: int) -> str:
    """A parameter count in words: 921600 -> "922K", 134515008 -> "135M"."""
    for limit, unit in ((1e9, "B"), (1e6, "M"), (1e3, "K")):
        if number >= limit:
            return f"{_three_figures(number / limit)}{unit}"
    return str(number)


def size(nbytes: int) -> str:
    """A file size: 19560000 -> "19.6 MB"."""
    for limit, unit in ((1e9, "GB"), (1e6, "MB"), (1e3, "kB")):
        if nbytes >= limit:
            return f"{_three_figures(nbytes / limit)} {unit}"
    return f"{nbytes} B"


def _three_figures(value: float) -> str:
    return f"{value:.3g}" if value < 999.5 else f"{value:,.0f}"


def duration(seconds: float) -> str:
    """A time for people: 367 -> "6 min 7 s", 42 -> "42 s"."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours} h {minutes} min"
    return f"{minutes} min {rest} s" if minutes else f"{rest} s"


def _flat(values: Mapping[str, Any], prefix: str = "") -> list[tuple[str, str]]:
    """Nested settings as (label, value) in words: `lora: {r: 16}` -> ("lora r", "16")."""
    found: list[tuple[str, str]] = []
    for key, value in values.items():
        label = f"{prefix}{str(key).replace('_', ' ')}"
        if isinstance(value, Mapping) and value:
            found += _flat(value, f"{label} ")
        else:
            found.append((label, f"{value:.1%}" if label.endswith("share") else _words(value)))
    return found


def _words(value: Any) -> str:
    if value is None or value == [] or value == {}:
        return "none"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int):
        return f"{value:,}"
    if isinstance(value, float):
        return f"{value:.6g}"
    if isinstance(value, list):
        return ", ".join(_words(item) for item in value)
    return str(value)


# ---------------------------------------------------------------- charts


def _loss_chart(
    steps: Sequence[Mapping[str, Any]], evaluations: Sequence[Mapping[str, Any]], best_step: int | None
) -> Any:
    train = thinned([(row["step"], row["loss"]) for row in steps])
    valid = [(row["step"], row["eval_loss"]) for row in evaluations]
    curves = [Curve(train, "train raw"), Curve(smoothed(train), "train"), Curve(valid, "valid", marked=True)]
    words = "No steps yet."
    if train:
        (first, high), (last, low) = train[0], train[-1]
        words = f"Training loss from {high:.3f} at step {first:.0f} to {low:.3f} at step {last:.0f}."
    if valid:
        words += f" Validation loss from {valid[0][1]:.3f} to {valid[-1][1]:.3f}."
    best = next(((x, y) for x, y in valid if x == best_step), None)
    return chart("loss", "Training and validation loss by step", words, curves, circled=best)


def _rate_chart(steps: Sequence[Mapping[str, Any]]) -> Any:
    points = thinned([(row["step"], row["lr"]) for row in steps])
    words = f"Learning rate, at most {max(y for _, y in points):.3g}." if points else "No steps yet."
    return chart("rate", "Learning rate by step", words, [Curve(points, "train")], from_zero=True)


def thinned(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """At most `_MOST_POINTS` points: means over stretches of equal length, first and last kept as they are."""
    stretch = math.ceil(len(points) / _MOST_POINTS)
    if stretch <= 1:
        return list(points)
    groups = [points[i : i + stretch] for i in range(1, len(points) - 1, stretch)]
    means = [(sum(x for x, _ in group) / len(group), sum(y for _, y in group) / len(group)) for group in groups]
    return [points[0], *means, points[-1]]


def smoothed(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """A centred moving average over a fifteenth of the curve: the trend behind the noise of single steps."""
    reach = len(points) // 30
    windows = [points[max(0, i - reach) : i + reach + 1] for i in range(len(points))]
    return [(x, sum(y for _, y in window) / len(window)) for (x, _), window in zip(points, windows, strict=True)]


def chart(
    name: str,
    title: str,
    description: str,
    curves: Sequence[Curve],
    circled: tuple[float, float] | None = None,
    *,
    from_zero: bool = False,
    x_label: str = "step",
    y_words: Callable[[float], str] | None = None,
) -> Any:
    """A line chart as inline SVG that takes its colours from the page's style.

    Args:
        name: unique on the page; ties title and description to the drawing for screen readers.
        title: what is drawn.
        description: what it shows, in words.
        curves: lines to draw, in order; one without points is left out.
        circled: a point to stress.
        from_zero: whether the y axis starts at 0.
        x_label: what the x axis counts.
        y_words: a value on the y axis as text; None: as a number.

    Returns:
        Markup, safe to put into the page.
    """
    from markupsafe import Markup, escape

    points = [point for curve in curves for point in curve.points]
    xs, ys = [x for x, _ in points] or [0.0, 1.0], [y for _, y in points] or [0.0, 1.0]
    x_ticks = ticks(min(xs), max(xs), 5, whole=True)
    y_ticks = ticks(0.0 if from_zero else min(ys), max(ys), 5)
    x_low, x_high = min(xs), max(max(xs), min(xs) + 1)
    y_low, y_high = y_ticks[0], y_ticks[-1]

    def place(x: float, y: float) -> tuple[float, float]:
        across = _LEFT + (x - x_low) / (x_high - x_low) * (_WIDTH - _LEFT - _RIGHT)
        down = _HEIGHT - _BOTTOM - (y - y_low) / (y_high - y_low) * (_HEIGHT - _TOP - _BOTTOM)
        return round(across, 1), round(down, 1)

    parts = []
    for y in y_ticks:
        _, down = place(x_low, y)
        parts.append(f'<line class="grid" x1="{_LEFT}" x2="{_WIDTH - _RIGHT}" y1="{down}" y2="{down}"/>')
        parts.append(f'<text x="{_LEFT - 6}" y="{down + 4}" text-anchor="end">{(y_words or _tick)(y)}</text>')
    for x in (x for x in x_ticks if x_low <= x <= x_high):
        across, down = place(x, y_low)
        parts.append(f'<text x="{across}" y="{down + 18}" text-anchor="middle">{x:,.0f}</text>')
    parts.append(
        f'<text x="{(_LEFT + _WIDTH - _RIGHT) / 2}" y="{_HEIGHT - 4}" text-anchor="middle">{escape(x_label)}</text>'
    )
    for curve in curves:
        placed = [place(x, y) for x, y in curve.points]
        if len(placed) > 1:
            parts.append(f'<polyline class="{curve.classes}" points="{" ".join(f"{x},{y}" for x, y in placed)}"/>')
        if curve.marked or len(placed) == 1:
            parts += [f'<circle class="{curve.classes}" cx="{x}" cy="{y}" r="3"/>' for x, y in placed]
    if circled is not None:
        x, y = place(*circled)
        parts.append(f'<circle class="best" cx="{x}" cy="{y}" r="5"/>')
    return Markup(  # noqa: S704 - numbers formatted above; the words are escaped
        f'<svg viewBox="0 0 {_WIDTH} {_HEIGHT}" role="img" aria-labelledby="{name}-title {name}-words">'
        f'<title id="{name}-title">{escape(title)}</title><desc id="{name}-words">{escape(description)}</desc>'
        f"{''.join(parts)}</svg>"
    )


def ticks(low: float, high: float, about: int, *, whole: bool = False) -> list[float]:
    """Round numbers that enclose [low, high], about `about` of them: steps of 1, 2 or 5 times a power of ten."""
    if high <= low:
        high = low + (abs(low) or 1.0) * 0.1
    rough = (high - low) / about
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(factor * power for factor in (1, 2, 5, 10) if factor * power >= rough * 0.999)
    step = max(step, 1.0) if whole else step
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [i * step for i in range(first, last + 1)]


def _tick(value: float) -> str:
    return "0" if value == 0 else f"{value:.4g}"
