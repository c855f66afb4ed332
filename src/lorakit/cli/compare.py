"""`lorakit compare`: several methods on the same rows, each at its own best learning rate, over seeds."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import click

from lorakit.cli.common import columns, console, emit, numbers, verb
from lorakit.config import plain_value
from lorakit.errors import ConfigError

if TYPE_CHECKING:
    from lorakit.comparison import Comparison


@verb("compare")
@click.argument("data")
@click.option(
    "--methods", required=True, metavar="NAME,NAME,...", help="lora, rslora, dora, full, ...; lora:r=64 sets more."
)
@click.option(
    "--output", required=True, metavar="FOLDER", help="Of the comparison; one that was begun is gone on with."
)
@click.option("--model", required=True, help="Hub id, folder, .gguf file or smollm2.")
@click.option("--valid", "--validation", metavar="FILE", help="Validation rows; without it some are held out.")
@click.option("--test", metavar="FILE", help="Rows on which the best of each method is measured.")
@click.option("--metric", "metrics", multiple=True, help="For --test, as in eval.  [default: loss]")
@click.option("--limit", type=int, help="Use only the first rows of --test.")
@click.option("--max-new-tokens", type=int, default=256, show_default=True, help="Longest answer.")
@click.option(
    "--rates", multiple=True, metavar="R,R,...", help="Learning rates of every sweep.  [default: own / 3, own, own * 3]"
)
@click.option("--seeds", type=int, default=3, show_default=True, help="Runs of each method at its best rate.")
@click.option("--budget", metavar="TIME", help="No run is begun that would not end in it: 90m, 2h.  [default: none]")
@click.option(
    "--set", "settings", multiple=True, metavar="NAME=VALUE", help="A setting of train for all; may be given again."
)
def command(
    data: str,
    methods: str,
    output: str,
    model: str,
    valid: str | None,
    metrics: Sequence[str],
    rates: Sequence[str],
    budget: str | None,
    settings: Sequence[str],
    as_json: bool,
    **options: Any,
) -> None:
    """Train with several methods on DATA and say which does how well, in what time and memory.

    Every method gets its own sweep of learning rates and, at the best, several seeds: methods compared at one rate are
    compared by how well that rate suits them. Each run has a process and a folder of its own.
    """
    from lorakit.comparison import compare

    shared: dict[str, Any] = {"model": model, "data": data, "validation": valid}
    for text in settings:
        name, equals, value = text.partition("=")
        if not equals:
            raise ConfigError(f"--set {text}: write NAME=VALUE, a setting of lorakit train")
        shared[name] = plain_value(value)
    names = [name.strip() for value in metrics for name in value.split(",")]
    with console.status("comparing") as status:
        result = compare(
            shared,
            [name.strip() for name in methods.split(",") if name.strip()],
            output,
            rates=numbers("--rates", rates) if rates else (),
            budget=None if budget is None else seconds(budget),
            metrics=names or ("loss",),
            on_stage=status.update,
            **options,
        )
    for line in result_lines(result):
        console.print(line)
    emit(result.to_dict(), as_json)


def seconds(text: str) -> float:
    """A time as people write it: 90s, 45m, 2h.

    Raises:
        ConfigError: it is none.
    """
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([smh])", text.strip())
    if match is None:
        raise ConfigError(f"--budget {text}: write a number and s, m or h: 90m")
    return float(match[1]) * {"s": 1, "m": 60, "h": 3600}[match[2]]


def result_lines(result: Comparison) -> Iterator[str]:
    """The table, and what has to be said of it."""
    from lorakit.comparison.summary import table

    yield from columns(table(result.rows))
    yield from (f"note   {note}" for note in result.notes)
    yield f"done   {result.directory}/compare.html, table.md"
