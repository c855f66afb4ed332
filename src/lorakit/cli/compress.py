"""`lorakit compress`: an adapter of lower rank, or the smallest one that held-out rows cannot tell from the whole."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal, cast

import click

from lorakit.cli.combine import result_lines
from lorakit.cli.common import console, emit, verb
from lorakit.cli.loading import model_options
from lorakit.cli.outputs import refuse_taken, tokenizer_of, write_adapter
from lorakit.errors import ConfigError

if TYPE_CHECKING:
    from lorakit.smallest_rank import Trial


@verb("compress")
@click.argument("adapter")
@click.option("--output", metavar="FOLDER", help="Where the compressed adapter goes; with --data it may be left out.")
@click.option("--rank", type=int, help="The same rank for every layer.")
@click.option("--energy", type=float, help="Share of all squared singular values that stays; ranks differ per layer.")
@click.option("--data", metavar="DATA", help="Held-out rows: find the smallest rank they cannot tell from the whole.")
@click.option("--by", type=click.Choice(["rank", "energy"]), default="rank", show_default=True, help="What to try.")
@click.option(
    "--noise", type=float, default=2.0, show_default=True, help="Standard errors that count as no difference."
)
@click.option("--limit", type=int, help="Use only the first rows.")
@click.option("--max-length", type=int, default=1024, show_default=True, help="Longest row, in tokens.")
@click.option("--split", default="test", show_default=True, help="Split of a Hub data set.")
@model_options
def command(
    adapter: str,
    output: str | None,
    rank: int | None,
    energy: float | None,
    data: str | None,
    by: str,
    noise: float,
    as_json: bool,
    **settings: Any,
) -> None:
    """Lower the rank of ADAPTER: to --rank, to --energy, or, with --data, as far as held-out rows do not notice."""
    from lorakit.adapter.compress import compress
    from lorakit.adapter.value import Adapter

    if sum(given is not None for given in (rank, energy, data)) != 1:
        raise ConfigError("give one of --rank, --energy and --data")
    if output is None and data is None:
        raise ConfigError("--output: where is the compressed adapter to go?")
    if output is not None:
        refuse_taken(output)
    files = tokenizer_of([adapter])
    told: dict[str, Any] = {"adapter": adapter, "output": output}
    if data is not None:
        truncated, search = _searched(adapter, data, by, noise, settings)
        told["search"] = search
        if truncated is None:
            emit({**told, "output": None}, as_json)
            return
    else:
        truncated = compress(Adapter.load(adapter), rank=rank, energy=energy)
    if output is not None:
        write_adapter(truncated.adapter, output, files)
        for line in result_lines(truncated, output):
            console.print(line)
    emit({**told, **truncated.to_dict()}, as_json)


def _searched(adapter: str, data: str, by: str, noise: float, settings: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    """The smallest `Truncated` within noise, or None; and what was tried, for JSON."""
    from lorakit.smallest_rank import smallest_rank

    console.print(f"{by:>8}  parameters  error   loss     difference  standard error")

    def tell(trial: Trial) -> None:
        size = f"{trial.rank}" if trial.energy is None else f"{trial.energy:g}"
        verdict = "within noise" if trial.within_noise else "worse"
        console.print(
            f"{size:>8}  {trial.parameters:>10,}  {trial.relative_error:>5.1%}  {trial.loss:<7.4f}  "
            f"{trial.difference:>+10.5f}  {trial.standard_error:>14.5f}  {verdict}"
        )

    kind = cast("Literal['rank', 'energy']", by)
    search = smallest_rank(adapter, data=data, by=kind, noise=noise, on_trial=tell, **settings)
    console.print(f"{'whole':>8}  {search.parameters:>10,}  {0:>5.1%}  {search.loss:<7.4f}  ({search.rows:,} rows)")
    if search.best is None:
        console.print(f"nothing smaller is within {noise:g} standard errors; the adapter stays as it is")
        return None, search.to_dict()
    best = search.best
    size = f"rank {best.rank}" if best.energy is None else f"energy {best.energy:g}"
    share = best.parameters / search.parameters
    console.print(f"smallest within {noise:g} standard errors: {size}, {share:.0%} of the parameters")
    return best.truncated, search.to_dict()
