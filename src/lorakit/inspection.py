"""An adapter's spectrum laid out for people: layers by modules, as a table of numbers and as one HTML page.

Knows neither the command line nor the model; draws with what `report` draws with.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from lorakit.adapter.spectrum import LayerSpectrum, Spectrum
from lorakit.adapter.value import Adapter
from lorakit.files import write_text
from lorakit.report import Curve, chart, count, rendered, size

_NUMBERED = re.compile(r"(?P<stack>.*?)(?:^|\.)(?P<number>\d+)(?:\.(?P<module>.*))?$")


class Measure(NamedTuple):
    """One figure of a layer: its attribute of `LayerSpectrum`, and what to call it."""

    attribute: str
    label: str
    words: str

    def of(self, layer: LayerSpectrum) -> float:
        """Its value."""
        return float(getattr(layer, self.attribute))


MEASURES = {
    "norm": Measure("frobenius_norm", "Frobenius norm", "how much a layer is changed"),
    "energy": Measure("energy", "energy", "the squared norm: each layer's part in the whole change"),
    "effective_rank": Measure("effective_rank", "effective rank", "in how many directions a layer is changed"),
    "stable_rank": Measure("stable_rank", "stable rank", "energy in units of the strongest direction's"),
}


@dataclass(frozen=True, kw_only=True)
class Grid:
    """Layers in rows, modules in columns.

    Attributes:
        rows: labels, e.g. "0", "1"; "–" for what belongs to no numbered layer.
        columns: labels, e.g. "q_proj".
        paths: (row, column) as indices -> module path.
    """

    rows: tuple[str, ...]
    columns: tuple[str, ...]
    paths: Mapping[tuple[int, int], str]


def grid(paths: Sequence[str]) -> Grid:
    """Lay module paths out by the first number in them: model.layers.3.mlp.up_proj is "up_proj" in row 3."""
    placed = {path: _place(path) for path in paths}
    rows = sorted({row for row, _ in placed.values()}, key=lambda row: (row[1] is None, row[0], row[1] or 0))
    columns = list(dict.fromkeys(module for _, module in placed.values()))
    stacks = {stack for stack, number in rows if number is not None}
    ends = [module.rpartition(".")[2] for module in columns]
    short = [end if ends.count(end) == 1 else module for end, module in zip(ends, columns, strict=True)]
    labels = [
        "–" if number is None else str(number) if len(stacks) == 1 else f"{stack}.{number}" for stack, number in rows
    ]
    return Grid(
        rows=tuple(labels),
        columns=tuple(short),
        paths={(rows.index(row), columns.index(module)): path for path, (row, module) in placed.items()},
    )


def _place(path: str) -> tuple[tuple[str, int | None], str]:
    """((the stack of layers, number in it), module)."""
    match = _NUMBERED.fullmatch(path)
    if match is None:
        return ("", None), path
    return (match["stack"], int(match["number"])), match["module"] or "(itself)"


def figures(adapter: Adapter, spectrum: Spectrum) -> dict[str, Any]:
    """All there is to tell, for JSON."""
    config, base = adapter.config, adapter.base
    return {
        "base": None if base is None else base.name,
        **adapter.summary(),
        "scaling": config.scaling,
        "bias": config.bias,
        "lora_bias": config.lora_bias,
        "modules_to_save": list(config.modules_to_save),
        "soft_prompt": None if adapter.prompt is None else adapter.prompt.config.soft_prompt,
        "metadata": dict(adapter.metadata),
        "spectrum": spectrum.to_dict(),
        "summed_effective_rank": math.fsum(layer.effective_rank for layer in spectrum.layers.values()),
    }


# ---------------------------------------------------------------- page

_ROW, _COLUMN, _MARGIN = 20, 64, 60  # units of the drawing; a row holds text of 11 units


def write_page(path: str | Path, name: str, adapter: Adapter, spectrum: Spectrum) -> Path:
    """Write one self-contained HTML page: heat maps of layers x modules, singular values, and all figures in a table.

    Raises:
        FileError: it cannot be written.
    """
    layout = grid(list(spectrum.layers))
    summary = adapter.summary()
    tiles = [
        {"label": "Layers", "value": f"{summary['layers']:,}", "detail": f"rank {_span(summary['ranks'])}"},
        {"label": "Parameters", "value": count(summary["parameters"]), "detail": size(summary["bytes"])},
        {"label": "Norm of the update", "value": f"{spectrum.frobenius_norm:.3g}", "detail": "all layers together"},
    ]
    if adapter.prompt is not None:
        kind = adapter.prompt.config.soft_prompt
        tiles.append({"label": "Virtual tokens", "value": f"{adapter.prompt.length:,}", "detail": kind})
    contents = {
        "name": name,
        "subtitle": f"made on {adapter.base.name}" if adapter.base and adapter.base.name else "of an unnamed base",
        "tiles": tiles,
        "maps": [
            (MEASURES[key], _heat_map(key, layout, spectrum)) for key in ("norm", "effective_rank") if layout.paths
        ],
        "charts": [(column, _curves(number, column, layout, spectrum)) for number, column in enumerate(layout.columns)],
        "measures": list(MEASURES.values()),
        "layers": [
            (path, layer, [f"{measure.of(layer):.4g}" for measure in MEASURES.values()])
            for path, layer in spectrum.layers.items()
        ],
    }
    write_text(path, rendered("inspect.html.jinja", contents))
    return Path(path)


def _span(ranks: Sequence[int]) -> str:
    return "none" if not ranks else str(ranks[0]) if len(ranks) == 1 else f"{ranks[0]} to {ranks[-1]}"


def _heat_map(key: str, layout: Grid, spectrum: Spectrum) -> Any:
    """A cell a layer, the stronger in colour the higher its figure; what is written in it is the figure."""
    from markupsafe import Markup, escape

    measure = MEASURES[key]
    values = {place: measure.of(spectrum[path]) for place, path in layout.paths.items()}
    highest = max(values.values()) or 1.0
    margin = max(_MARGIN, 8 * max(map(len, layout.rows)))
    width, height = margin + _COLUMN * len(layout.columns), _ROW * (len(layout.rows) + 1)
    parts = [
        f'<text class="small" x="{margin + _COLUMN * (column + 0.5)}" y="13" text-anchor="middle">'
        f"{escape(_shortened(label))}<title>{escape(label)}</title></text>"
        for column, label in enumerate(layout.columns)
    ]
    parts += [
        f'<text class="small" x="{margin - 6}" y="{_ROW * (row + 1) + 14}" text-anchor="end">{escape(label)}</text>'
        for row, label in enumerate(layout.rows)
    ]
    for (row, column), value in values.items():
        x, y, share = margin + _COLUMN * column, _ROW * (row + 1), value / highest
        strong = " strong" if share > 0.55 else ""
        parts.append(
            f"<g><title>{escape(layout.paths[row, column])}: {measure.label} {value:.4g}</title>"
            f'<rect class="cell" x="{x + 1}" y="{y + 1}" width="{_COLUMN - 2}" height="{_ROW - 2}" '
            f'fill-opacity="{share:.3f}"/><text class="small{strong}" x="{x + _COLUMN / 2}" y="{y + 14}" '
            f'text-anchor="middle">{value:.3g}</text></g>'
        )
    words = f"{measure.label} of each layer, from {min(values.values()):.3g} to {max(values.values()):.3g}"
    return Markup(  # noqa: S704 - numbers formatted above; the words are escaped
        f'<svg class="map" style="width: {width / 16}rem" viewBox="0 0 {width} {height}" role="img" '
        f'aria-label="{escape(words)}">{"".join(parts)}</svg>'
    )


def _shortened(label: str) -> str:
    return label if len(label) <= 10 else f"…{label[-9:]}"


def _curves(number: int, column: str, layout: Grid, spectrum: Spectrum) -> Any:
    """Singular values of one module, a line a layer, and their geometric mean; logarithmic."""
    layers = [spectrum[path] for (_, own), path in layout.paths.items() if own == number]
    curves = [_logarithms(layer.singular_values.tolist()) for layer in layers]
    longest = max(map(len, curves))
    gathered = [[curve[i][1] for curve in curves if i < len(curve)] for i in range(longest)]
    mean = [(i + 1.0, sum(values) / len(values)) for i, values in enumerate(gathered)]
    lines = [Curve(curve, "train raw") for curve in curves] if len(curves) > 1 else []
    words = "No update."
    if mean:
        words = f"From {10 ** mean[0][1]:.3g} to {10 ** mean[-1][1]:.3g}, mean of {len(layers)} layers."
    title = f"Singular values of {column}"
    return chart(
        f"values-{number}", title, words, [*lines, Curve(mean, "train")], x_label="singular value", y_words=_power
    )


def _logarithms(values: Sequence[float]) -> list[tuple[float, float]]:
    """(place, log10) of what is not zero beside the largest."""
    return [(place + 1.0, math.log10(value)) for place, value in enumerate(values) if value > 1e-9 * values[0]]


def _power(exponent: float) -> str:
    return f"{10**exponent:.2g}"
