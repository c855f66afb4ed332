"""What `convert` and `export` share: the base an adapter is for, reading it, writing it, and saying so."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from lorakit.cli.common import console
from lorakit.errors import ConfigError, MissingDependencyError, ModelError

if TYPE_CHECKING:
    from lorakit.adapter.value import Adapter
    from lorakit.formats import Context


def context_of(model: str | None, alpha: float | None) -> Context:
    """What is known besides the file: the base's layers, from its config alone, and alpha."""
    from lorakit.formats import BaseFacts, Context
    from lorakit.models import load_skeleton

    return Context(base=None if model is None else BaseFacts.of(load_skeleton(model)), alpha=alpha)


def context_for_writing(value: Adapter, context: Context) -> Context:
    """The same, with the base that the adapter names where none was given; if it is not here, the format may do without
    it (or say that it cannot).
    """
    name = value.base.name if value.base is not None else None
    if context.base is not None or name is None:
        return context
    try:
        found = context_of(name, context.alpha)
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
    from lorakit.formats import codec, load_adapter, recognise, save_adapter
    from lorakit.report import size

    codec(target)  # a misspelled name is told before anything is read
    if Path(source).resolve() == Path(output).resolve():
        raise ConfigError(f"--output {output} is the adapter itself; name another place")
    source_format = source_format or recognise(source)
    value = load_adapter(source, format=source_format, context=context)
    written = save_adapter(value, output, format=target, context=context_for_writing(value, context))
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
