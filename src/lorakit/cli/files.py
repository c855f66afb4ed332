"""What `convert` and `export` share: their flags, the base an adapter is for, reading it, writing it, and saying so."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from lorakit.cli.common import console
from lorakit.errors import ConfigError, MissingDependencyError, ModelError

if TYPE_CHECKING:
    from lorakit.adapter.value import Adapter
    from lorakit.formats import Context


def context_options(function: Callable[..., None]) -> Callable[..., None]:
    """What a file may not say (`Context`): `--model`, `--base-reference`, `--tensor-type`, `--enable-lora`."""
    for option in (
        click.option(
            "--enable-lora",
            metavar="BOOL,...",
            callback=_parts,
            help="loralib: which equal parts of a MergedLinear's output have an update, e.g. true,false,true.",
        ),
        click.option(
            "--tensor-type",
            type=click.Choice(["f32", "f16"]),
            default="f32",
            show_default=True,
            help="Tensors of gguf.",
        ),
        click.option(
            "--base-reference",
            metavar="NAME",
            help="What the base is called where the adapter goes: ollama's FROM (llama3.2), vllm's model.",
        ),
        click.option(
            "--model",
            "--model_name_or_path",
            help="The base (its config is read, no weights); without it, the one that the adapter names.",
        ),
    ):
        function = option(function)
    return function


def _parts(context: click.Context, parameter: click.Parameter, value: str | None) -> tuple[bool, ...] | None:
    if value is None:
        return None
    words = {"true": True, "1": True, "false": False, "0": False}
    parts = [word.strip().casefold() for word in value.split(",")]
    if not all(part in words for part in parts):
        raise click.BadParameter(
            f"{value!r} is not true or false for each part, e.g. true,false,true", context, parameter
        )
    return tuple(words[part] for part in parts)


_WITH_TOKENIZER = ("peft", "vllm")  # folders whose readers take the tokenizer beside the adapter


def context_of(model: str | None, alpha: float | None, base_reference: str | None = None, **known: Any) -> Context:
    """What is known besides the file: the base's layers, from its config alone, alpha, and the flags above."""
    from lorakit.formats import BaseFacts, Context
    from lorakit.models import load_skeleton

    if model is None:
        return Context(alpha=alpha, base_reference=base_reference, **known)
    reference = base_reference or reference_of(model)
    return Context(base=BaseFacts.of(load_skeleton(model)), alpha=alpha, base_reference=reference, **known)


def reference_of(model: str) -> str | None:
    """How other tools on this machine find the base: by its file or folder, if it is one."""
    from lorakit.models import resolve

    try:
        source = resolve(model)
    except ModelError:  # a diffusion pipeline, which none of these tools takes
        return None
    return None if source.kind == "hub" else source.location


def context_for_writing(value: Adapter, context: Context) -> Context:
    """The same, with the base that the adapter names where none was given; if it is not here, the format may do without
    it (or say that it cannot).
    """
    name = value.base.name if value.base is not None else None
    if context.base is not None or name is None:
        return context
    try:
        there = context_of(name, None, context.base_reference)
        found = replace(context, base=there.base, base_reference=there.base_reference)
    except (ModelError, MissingDependencyError) as error:
        console.print(f"base   {name}, named by the adapter, is not at hand ({error}); --model names another place")
        return context
    console.print(f"base   {name}, named by the adapter")
    return found


def transcribe(source: str, source_format: str | None, target: str, output: str, context: Context) -> dict[str, Any]:
    """Read one format, write another, say what came of it.

    Returns:
        The same as an object, for `--json`.

    Raises:
        AdapterFileError: the file is unsound, or the target cannot carry what is in it; nothing is written.
    """
    from lorakit.cli.outputs import refuse_taken, tokenizer_of
    from lorakit.files import write_bytes
    from lorakit.formats import codec, load_adapter, recognise, save_adapter
    from lorakit.report import size

    codec(target)  # a misspelled name is told before anything is read
    if Path(source).resolve() == Path(output).resolve():
        raise ConfigError(f"--output {output} is the adapter itself; name another place")
    refuse_taken(output)
    tokenizer = tokenizer_of([source])
    source_format = source_format or recognise(source)
    value = load_adapter(source, format=source_format, context=context)
    written = save_adapter(value, output, format=target, context=context_for_writing(value, context))
    kept = tokenizer if target in _WITH_TOKENIZER else {}
    for name, content in kept.items():  # the chat template it was trained with is part of what it answers
        write_bytes(written / name, content)
    if tokenizer and not kept:
        console.print(f"note   {target} holds no tokenizer or chat template; those beside {source} stay there")
    files = [written] if written.is_file() else [path for path in written.rglob("*") if path.is_file()]
    total = sum(path.stat().st_size for path in files)
    about = value.summary()
    ranks = "-".join(map(str, dict.fromkeys((about["ranks"][0], about["ranks"][-1])))) if about["ranks"] else "none"
    console.print(f"read   {source} ({source_format}): {about['layers']:,} layers, rank {ranks}")
    console.print(f"wrote  {written} ({target}), {size(total)}")
    return {
        "ok": True,
        "adapter": source,
        "from": source_format,
        "to": target,
        "output": str(written),
        **about,
        "bytes": total,
    }
