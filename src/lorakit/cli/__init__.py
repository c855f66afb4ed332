"""The command `lorakit`: a table of verbs, each imported when it is called.

Knows no verb's flags, and imports nothing heavy.
"""

from __future__ import annotations

import contextlib
import importlib
from collections.abc import Sequence
from typing import Any, NoReturn

import click

import lorakit
from lorakit.errors import nearest

# verb -> (module that holds it as `command`, one line of help, kept here so that `lorakit --help` imports no verb)
VERBS: dict[str, tuple[str, str]] = {
    "demo": ("lorakit.cli.demo", "Train a small real model on a made task, and compare."),
    "check": (
        "lorakit.cli.check",
        "Show rows as the model will see them: tokens, loss mask, problems.",
    ),
    "plan": ("lorakit.cli.plan", "Say what a run will take: memory, time, settings that fit."),
    "targets": ("lorakit.cli.targets", "Show what presets mean in a model, and what adapting it takes."),
    "train": ("lorakit.cli.train", "Train an adapter on a data file."),
    "eval": ("lorakit.cli.eval", "Measure a model and its adapters on held-out rows."),
    "generate": ("lorakit.cli.generate", "Answer prompts or rows, many at a time."),
    "chat": ("lorakit.cli.chat", "Talk with a model and its adapter."),
    "combine": ("lorakit.cli.combine", "Make one adapter of several."),
    "compress": ("lorakit.cli.compress", "Lower an adapter's rank, as far as held-out rows allow."),
    "compare": ("lorakit.cli.compare", "Train with several methods and say which does how well."),
    "extract": ("lorakit.cli.extract", "Make an adapter of a fully fine-tuned model and its base."),
    "inspect": ("lorakit.cli.inspect", "Show what an adapter changes, layer by layer."),
    "merge": ("lorakit.cli.merge", "Fold adapters into their base, verify, write a plain model."),
    "convert": ("lorakit.cli.convert", "Write an adapter in another file format."),
    "export": ("lorakit.cli.export", "Write an adapter for another tool; --lint tells what it cannot carry."),
}


class _Verbs(click.Group):
    """A group whose commands are the rows of `VERBS`, imported one at a time."""

    def make_context(
        self, info_name: str | None, args: list[str], parent: click.Context | None = None, **extra: Any
    ) -> click.Context:
        with _reported(args):
            return super().make_context(info_name, args, parent, **extra)

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(VERBS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in VERBS:
            return None
        command: click.Command = importlib.import_module(VERBS[cmd_name][0]).command
        return command

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        with _reported(args):
            if args[0] not in VERBS and not args[0].startswith("-"):
                _unknown_verb(ctx, args[0])
            return super().resolve_command(ctx, args)

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Verbs"):
            formatter.write_dl([(name, text) for name, (_, text) in VERBS.items()])


def _reported(args: Sequence[str]) -> contextlib.AbstractContextManager[None]:
    """What goes wrong before a verb is found is an object with `--json`, as it is afterwards."""
    if "--json" not in args:
        return contextlib.nullcontext()
    from lorakit.cli.common import reported

    return reported(as_json=True)


def _unknown_verb(ctx: click.Context, name: str) -> NoReturn:
    guess = nearest(name, VERBS)
    hint = f"Did you mean {' or '.join(guess)}?" if guess else f"Verbs: {', '.join(VERBS)}."
    ctx.fail(f"No such verb: {name!r}. {hint}")


@click.group(cls=_Verbs, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 120})
@click.version_option(lorakit.__version__, prog_name="lorakit")
def main() -> None:
    """A base model and a data file in; a small, measured, verified low-rank adapter out.

    Every verb takes --json (the last line of stdout is one JSON object; text for people goes to stderr) and
    --config FILE.yaml (the same names as the flags, which override it). Start with: lorakit demo
    """
