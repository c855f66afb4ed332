"""`lorakit combine`: one adapter from several."""

from __future__ import annotations

from typing import Any

import click

from lorakit.cli.common import console, emit, numbers, verb
from lorakit.cli.outputs import refuse_taken, tokenizer_of, write_adapter


@verb("combine")
@click.argument("adapters", nargs=-1, required=True, metavar="ADAPTER...")
@click.option("--output", required=True, metavar="FOLDER", help="Where the combined adapter goes.")
@click.option(
    "--weights", multiple=True, metavar="W,W,...", help="One for each adapter, of any sign; 1 each if left out."
)
@click.option(
    "--method",
    default="cat",
    show_default=True,
    help="cat, linear (both exact), svd, ties, dare_linear, dare_ties, magnitude_prune, della, della_linear, knots.",
)
@click.option("--rank", type=int, help="Rank of the result, for methods that truncate.")
@click.option("--energy", type=float, help="svd: share of the squared singular values that stays.")
@click.option("--density", type=float, help="Share of each update's elements that stays (0.5 if left out).")
@click.option("--epsilon", type=float, help="della: spread of the probabilities of staying.")
@click.option("--inside", help="knots: the method in the common basis (ties if left out).")
@click.option("--seed", type=int, default=0, show_default=True, help="Determines the draws.")
@click.option("--tokenizer", metavar="ADAPTER", help="Whose tokenizer the result gets, where they differ.")
@click.option("--check-base/--no-check-base", default=True, show_default=True, help="Refuse adapters of other bases.")
def command(
    adapters: tuple[str, ...],
    output: str,
    weights: tuple[str, ...],
    method: str,
    tokenizer: str | None,
    check_base: bool,
    as_json: bool,
    **options: Any,
) -> None:
    """Combine ADAPTERs into one: docs/combining.md says what each method does and when it is exact."""
    from lorakit.adapter.combine import Options, combine_with_report

    refuse_taken(output)
    files = tokenizer_of(adapters, tokenizer)
    method = method.replace("-", "_")
    shares = numbers("--weights", weights) if weights else [1.0] * len(adapters)
    result = combine_with_report(adapters, shares, method, Options(**options), check_base=check_base)
    write_adapter(result.adapter, output, files)
    for adapter, share in zip(adapters, shares, strict=True):
        console.print(f"{share:>8g}  {adapter}")
    for line in result_lines(result, output):
        console.print(line)
    told = {"output": output, "method": method, "weights": shares, "adapters": list(adapters)}
    emit({**told, **result.to_dict()}, as_json)


def result_lines(result: Any, output: str) -> list[str]:
    """What came of it, in words. `result` is a `Truncated`."""
    from lorakit.report import count, size

    summary = result.adapter.summary()
    ranks = summary["ranks"]
    rank = "-".join(map(str, dict.fromkeys((ranks[0], ranks[-1])))) if ranks else "none"
    error = f"{result.relative_error:.2%} of the update lost" if result.error else "exact"
    layers = f"{summary['layers']:,} layers, rank {rank}"
    written = f"{count(summary['parameters'])} parameters, {size(summary['bytes'])}, in {output}"
    return [f"result  {layers}; {error} (norm {result.error:.3g})", f"        {written}"]
