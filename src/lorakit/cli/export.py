"""`lorakit export`: an adapter for another tool, and what that tool could not carry, told before training."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import click

from lorakit.adapter.config import LoRAConfig
from lorakit.cli.common import config_options, console, emit, verb
from lorakit.cli.files import context_for_writing, context_of, context_options, reference_of, transcribe
from lorakit.config import Config
from lorakit.errors import ConfigError

RESIDUAL = "peft-residual"
"""A target that is no format of adapters: an adapter and a base of its own."""


@dataclass(frozen=True, kw_only=True)
class _Planned(Config):
    """The adapter that is yet to be trained; its flags are those of `lorakit train`."""

    lora: LoRAConfig = field(default_factory=LoRAConfig)


@verb("export")
@click.option("--adapter", metavar="PATH", help="Adapter to export, of any format that can be read.")
@click.option(
    "--to", required=True, metavar="TARGET", help="gguf, ollama, vllm, kohya, ...: docs/formats.md lists them."
)
@click.option("--output", help="File or folder to write.")
@click.option("--from", "source_format", metavar="FORMAT", help="Format of --adapter; without it, recognised.")
@context_options
@click.option(
    "--lint", is_flag=True, help="Write nothing; tell what the target cannot carry, of --adapter or of settings."
)
@config_options(_Planned)
def command(
    adapter: str | None,
    to: str,
    output: str | None,
    source_format: str | None,
    model: str | None,
    lint: bool,
    config: _Planned,
    as_json: bool,
    **known: Any,
) -> None:
    """Write an adapter for another tool.

    With --lint nothing is written: what the target cannot carry is listed, of --adapter, or, before there is one, of
    the settings (the same as for train, or --config run.yaml) on --model. Exit code 2 if there is such a thing.

    --to peft-residual takes an adapter that began as a part of its base's weight (init pissa, olora, lora_ga) apart
    again: OUTPUT/adapter of the rank it was trained with, and OUTPUT/base, the base for it.
    """
    flags = click.get_current_context().params
    given = {key.removeprefix("lora__") for key in flags if key.startswith("lora__") and flags[key] is not None}
    alpha = config.lora.alpha if "alpha" in given else None
    planned = sorted(given - {"alpha"})
    if adapter is not None and planned:
        raise ConfigError(f"--{planned[0]} is a setting of an adapter yet to be trained; --adapter has its own")
    if lint:
        if adapter is None and model is None:
            raise ConfigError("--lint needs --adapter, or --model with the settings of the adapter to be trained")
        problems = _obstacles(adapter, source_format, to, model, config.lora, alpha, known)
        for problem in problems:
            console.print(f"  - {problem}")
        console.print(
            f"{to} cannot carry this: {len(problems)} thing(s)" if problems else f"ok     {to} can carry all of it"
        )
        emit({"ok": not problems, "to": to, "adapter": adapter, "model": model, "obstacles": problems}, as_json)
        if problems:
            raise click.exceptions.Exit(2)
        return
    if adapter is None or output is None:
        missing = [flag for flag, value in (("--adapter", adapter), ("--output", output)) if value is None]
        raise ConfigError(f"export needs {' and '.join(missing)}; to check settings before training, add --lint")
    if to == RESIDUAL:
        emit(_residual(adapter, output, model), as_json)
        return
    emit(transcribe(adapter, source_format, to, output, context_of(model, alpha, **known)), as_json)


def _residual(adapter: str, output: str, model: str | None) -> dict[str, Any]:
    from lorakit.merging.residual import save_residual

    with console.status("reading the base") as status:
        made = save_residual(adapter, output, model=model, on_stage=status.update)
    console.print(f"wrote  {made.base}: the base without what the adapter began with ({made.merge.how})")
    console.print(f"wrote  {made.adapter}: rank {made.rank}, for that base and no other")
    return {"ok": True, "to": RESIDUAL, **made.to_dict()}


def _obstacles(
    adapter: str | None,
    source_format: str | None,
    to: str,
    model: str | None,
    planned: LoRAConfig,
    alpha: float | None,
    known: dict[str, Any],
) -> list[str]:
    from lorakit.adapter.blank import blank_adapter
    from lorakit.formats import BaseFacts, Context, codec, load_adapter
    from lorakit.models import load_skeleton

    target = codec(to)  # a misspelled name is told before anything is read
    if adapter is not None:
        context = context_of(model, alpha, **known)
        value = load_adapter(adapter, format=source_format, context=context)
        return target.obstacles(value, context_for_writing(value, context))
    assert model is not None
    known["base_reference"] = known["base_reference"] or reference_of(model)
    skeleton = load_skeleton(model)
    return target.obstacles(blank_adapter(skeleton, planned), Context(base=BaseFacts.of(skeleton), **known))
