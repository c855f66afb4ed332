"""`lorakit inspect`: what is in an adapter, and where it changes its base most."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import click

from lorakit.cli.common import console, emit, verb

if TYPE_CHECKING:
    from rich.table import Table

    from lorakit.adapter.spectrum import Spectrum

_LOW, _HIGH = (236, 242, 249), (24, 78, 140)  # colours of the lowest and highest figure


@verb("inspect")
@click.argument("adapter")
@click.option(
    "--by",
    type=click.Choice(["norm", "energy", "effective_rank", "stable_rank"]),
    default="norm",
    show_default=True,
    help="What the heat map shows.",
)
@click.option("--top", type=click.IntRange(min=0), default=5, show_default=True, help="Most changed layers to list.")
@click.option("--html", "--plot", "html", metavar="FILE.html", help="Write heat maps and singular values as a page.")
def command(adapter: str, by: str, top: int, html: str | None, as_json: bool) -> None:
    """Show ADAPTER: base, layers, ranks, size, and how much it changes which layer in how many directions."""
    from lorakit.adapter.value import Adapter
    from lorakit.inspection import MEASURES, figures, write_page
    from lorakit.report import count, size

    value = Adapter.load(adapter)
    spectrum = value.spectrum()
    told = figures(value, spectrum)
    ranks = ", ".join(map(str, told["ranks"])) or "none"
    console.print(f"adapter  {adapter}")
    console.print(f"base     {told['base'] or 'not named'}")
    more = ", with biases of B (lora_bias)" if told["lora_bias"] else ""
    console.print(f"layers   {told['layers']:,}, rank {ranks}, scaling {told['scaling']}{more}")
    if value.prompt is not None:
        console.print(f"prompt   {value.prompt}, {count(value.prompt.values.numel())} parameters")
    if value.tokens:
        console.print(f"tokens   {len(value.config.trainable_tokens):,} rows of {', '.join(value.tokens)}")
    if value.biases or value.replaced:
        console.print(f"whole    {len(value.biases):,} biases, {len(value.replaced):,} tensors of modules_to_save")
    console.print(f"size     {count(told['parameters'])} parameters, {size(told['bytes'])}")
    if spectrum.layers:
        used = told["summed_effective_rank"] / sum(layer.r for layer in spectrum.layers.values())
        console.print(f"update   norm {spectrum.frobenius_norm:.4g}; effective rank {used:.0%} of the rank it has")
        console.print(f"\n{MEASURES[by].label}: {MEASURES[by].words}")
        console.print(heat_map(spectrum, by), soft_wrap=False)
        _tell_strongest(spectrum, top)
    if html is not None:
        write_page(html, adapter, value, spectrum)
        console.print(f"page     {html}")
    emit({"adapter": adapter, **told}, as_json)


def heat_map(spectrum: Spectrum, by: str) -> Table:
    """Layers x modules, each figure on its colour where the terminal has colours."""
    from rich.table import Table
    from rich.text import Text

    from lorakit.inspection import MEASURES, grid

    layout, measure = grid(list(spectrum.layers)), MEASURES[by]
    values = {place: measure.of(spectrum[path]) for place, path in layout.paths.items()}
    highest = max(values.values()) or 1.0
    table = Table(box=None, pad_edge=False, padding=(0, 1, 0, 0))
    table.add_column("", justify="right")
    for label in layout.columns:
        table.add_column(label, justify="right", no_wrap=True)
    for row, label in enumerate(layout.rows):
        cells = [
            Text(f" {values[row, column]:.3g} ", style=_style(values[row, column] / highest))
            if (row, column) in values
            else Text("")
            for column in range(len(layout.columns))
        ]
        table.add_row(label, *cells)
    return table


def _style(share: float) -> str:
    red, green, blue = (round(low + (high - low) * share) for low, high in zip(_LOW, _HIGH, strict=True))
    return f"{'white' if share > 0.5 else 'black'} on rgb({red},{green},{blue})"


def _tell_strongest(spectrum: Spectrum, top: int) -> None:
    strongest: list[Any] = sorted(spectrum.layers.items(), key=lambda item: -item[1].energy)[:top]
    if strongest:
        console.print("\nmost changed, with their largest singular values")
    for path, layer in strongest:
        values = " ".join(f"{value:.3g}" for value in layer.singular_values[:6].tolist())
        more = " ..." if len(layer.singular_values) > 6 else ""
        share = layer.energy / spectrum.energy if spectrum.energy else 0.0
        console.print(f"  {share:>6.1%}  {path}  {values}{more}")
