"""Every error lorakit raises on purpose. Each says what, where, what was allowed and what to do."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Sequence
from typing import Self


class LorakitError(Exception):
    """Something a person can act on. The command line prints it without a traceback and exits with 2."""


class ConfigError(LorakitError, ValueError):
    """A setting that is unknown, of the wrong type, out of range or at odds with another.

    `problems` holds a sentence for each, where several were found.
    """

    problems: tuple[str, ...] = ()

    @classmethod
    def listing(cls, where: str, problems: Sequence[str]) -> Self:
        """One error for all `problems` found in `where`."""
        error = cls(f"{where}: {len(problems)} problem{'s' if len(problems) > 1 else ''}:\n{bullet_list(problems)}")
        error.problems = tuple(problems)
        return error


class TargetError(ConfigError):
    """A target, pattern or exclusion that matches nothing in the model, or a layer that cannot be adapted."""


class AdapterError(LorakitError):
    """An operation on attached adapters that cannot be done: unknown name, name taken, nothing attached."""


class AdapterFileError(LorakitError):
    """An adapter file that is damaged, incomplete, hostile or not an adapter."""


class AdapterMismatchError(LorakitError):
    """A sound adapter that does not fit this model: tensors missing, unexpected, of another shape, another base."""


class MergeError(LorakitError):
    """A merged model that would not be the adapter: too much lost to rounding, or other outputs."""


class ModelError(LorakitError):
    """A base model that cannot be found, read or used."""


class DataError(LorakitError, ValueError):
    """Rows that cannot be read, or that would train nothing or the wrong thing."""


class FileError(LorakitError, OSError):
    """A file or folder that cannot be read or written as it must."""


class RunError(LorakitError):
    """A run folder that is in use, incomplete, or of another run."""


class NonFiniteLossError(LorakitError):
    """Training met NaN or infinity; names the step and the rows."""


class MissingDependencyError(LorakitError, ImportError):
    """An optional package is not installed; names the command that installs it."""


def nearest(name: str, known: Iterable[str], count: int = 3) -> list[str]:
    """The `count` most similar of `known`, best first, for "did you mean ...?".

    Example: ``nearest("lerning_rate", ["learning_rate", "seed"]) == ["learning_rate"]``.
    """
    folded: dict[str, list[str]] = {}
    for candidate in known:
        folded.setdefault(candidate.casefold(), []).append(candidate)
    matches = difflib.get_close_matches(name.casefold(), folded, n=count, cutoff=0.5)
    return [candidate for match in matches for candidate in folded[match]][:count]


def bullet_list(problems: Sequence[str], limit: int = 20) -> str:
    """`problems` one a line, the first `limit` of them, and how many were left out."""
    lines = [f"  - {problem}" for problem in problems[:limit]]
    if len(problems) > limit:
        lines.append(f"  ... and {len(problems) - limit} more")
    return "\n".join(lines)
