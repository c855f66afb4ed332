"""`lorakit extract`: an adapter out of a fully fine-tuned model and its base."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

import click

from lorakit.cli.common import console, emit, verb
from lorakit.cli.outputs import refuse_taken, write_adapter

if TYPE_CHECKING:
    from lorakit.extraction import Extracted


@verb("extract")
@click.argument("tuned")
@click.option("--base", required=True, metavar="MODEL", help="What it was tuned from: folder or Hub id.")
@click.option("--output", required=True, metavar="FOLDER", help="Where the adapter goes; must not exist yet.")
@click.option("--rank", "--r", type=int, default=16, show_default=True, help="Of every layer's update.")
@click.option(
    "--target-modules", multiple=True, metavar="NAME", help="Layers; may be given again.  [default: all-linear]"
)
@click.option("--modules-to-save", multiple=True, metavar="NAME", help="Modules taken whole; may be given again.")
def command(
    tuned: str,
    base: str,
    output: str,
    rank: int,
    target_modules: Sequence[str],
    modules_to_save: Sequence[str],
    as_json: bool,
) -> None:
    """Make an adapter of the difference between TUNED and --base, and say how much of it the rank holds.

    Both are read from their files, one weight at a time. What differs outside of the layers is listed.
    """
    from lorakit.adapter.config import LoRAConfig
    from lorakit.cli.outputs import tokenizer_of
    from lorakit.extraction import extract

    refuse_taken(output)
    config = LoRAConfig(
        r=rank, target_modules=tuple(target_modules) or "all-linear", modules_to_save=tuple(modules_to_save)
    )
    with console.status("extracting"):
        result = extract(tuned, base, config)
    write_adapter(result.truncated.adapter, output, tokenizer_of([tuned]))
    for line in result_lines(result, output):
        console.print(line)
    emit({"tuned": tuned, "base": base, "output": output, **result.to_dict()}, as_json)


def result_lines(result: Extracted, output: str) -> Iterator[str]:
    """What is in the adapter, what is not, and what to type next."""
    from lorakit.report import size

    truncated = result.truncated
    worst = sorted(truncated.errors, key=lambda path: -truncated.errors[path])[:3]
    yield (
        f"layers {len(truncated.errors):,} in an adapter of {size(truncated.adapter.nbytes)}; the rank leaves "
        f"{truncated.relative_error:.1%} of the difference out, most in {', '.join(worst)}"
    )
    if result.left_out:
        most = sorted(result.left_out.items(), key=lambda item: -item[1])
        listed = ", ".join(f"{name} ({share:.1e} of it)" for name, share in most[:3])
        yield (
            f"rest   {len(most):,} other parameters differ and are not in the adapter: {listed}"
            f"{', ...' if len(most) > 3 else ''}; --modules-to-save takes modules whole"
        )
    yield f"next   lorakit eval DATA --adapter {output}"
