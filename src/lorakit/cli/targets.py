"""`lorakit targets`: what there is to adapt in a model, and what each choice takes."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

import click

from lorakit.cli.common import columns, console, emit, verb

if TYPE_CHECKING:
    from lorakit.adapter.choices import Choice


@verb("targets")
@click.option("--model", required=True, help="Hub id, folder, .gguf file, or the alias smollm2.")
@click.option("--rank", "--r", type=click.IntRange(1), default=8, show_default=True, help="Of every layer's update.")
@click.option(
    "--target_modules",
    multiple=True,
    metavar="NAME[,NAME...]",
    help="One choice more: presets and names, as lorakit train takes them.",
)
def command(model: str, rank: int, target_modules: Sequence[str], as_json: bool) -> None:
    """Show which presets of --target-modules mean what in --model: layers, trained parameters, size of the adapter.

    No weights are read: a folder with its config.json will do, or a Hub id of a model larger than this machine.
    """
    from lorakit.adapter.choices import choices
    from lorakit.adapter.config import LoRAConfig
    from lorakit.models import load_skeleton

    asked = [name.strip() for value in target_modules for name in value.split(",")]
    with console.status("reading the config"):
        found = choices(load_skeleton(model), LoRAConfig(r=rank), asked)
    for line in lines(found):
        console.print(line)
    emit({"model": model, "r": rank, "choices": [choice.to_dict() for choice in found]}, as_json)


def lines(found: Sequence[Choice]) -> Iterator[str]:
    """The table, and below it why a choice is not to be had."""
    from lorakit.report import count, size

    rows = [["target_modules", "layers", "trained", "share", "adapter", "means"]]
    rows += [
        [
            choice.targets,
            f"{choice.layers:,}",
            count(choice.parameters),
            f"{choice.share:.2%}",
            size(choice.bytes),
            _names(choice),
        ]
        for choice in found
        if not choice.problem
    ]
    yield from columns(rows, left=(0, 5))
    yield from (f"{choice.targets}: {choice.problem}" for choice in found if choice.problem)


def _names(choice: Choice) -> str:
    """What it means, in names; "all-linear" has none of this model."""
    modules = choice.target_modules
    names = [*([modules] if isinstance(modules, str) else modules), *choice.target_parameters]
    shown = ", ".join(names[:8])
    return f"{shown}, ..." if len(names) > 8 else shown
