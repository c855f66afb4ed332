"""`lorakit convert`: an adapter from one file format to another."""

from __future__ import annotations

from typing import Any

import click

from lorakit.cli.common import emit, verb
from lorakit.cli.files import context_of, context_options, transcribe


@verb("convert")
@click.argument("adapter")
@click.option("--to", required=True, metavar="FORMAT", help="peft, kohya, diffusers, ...: docs/formats.md lists them.")
@click.option("--output", required=True, help="File or folder to write.")
@click.option("--from", "source_format", metavar="FORMAT", help="Format of ADAPTER; without it, recognised.")
@context_options
@click.option("--alpha", type=float, help="Numerator of the scale, for files that lack it (loralib).")
def command(
    adapter: str,
    to: str,
    output: str,
    source_format: str | None,
    model: str | None,
    alpha: float | None,
    as_json: bool,
    **known: Any,
) -> None:
    """Write ADAPTER, a file or folder of any format that can be read, in another one.

    What the target cannot carry is told by name, and nothing is written.
    """
    emit(transcribe(adapter, source_format, to, output, context_of(model, alpha, **known)), as_json)
