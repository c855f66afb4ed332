"""Regular expressions out of configs, which may be a stranger's: a few nested stars can keep Python's `re` busy for
years, so these are matched by the package `regex`, which can be told when to give up.
"""

from __future__ import annotations

import functools
import time
from collections.abc import Iterable

import regex

from lorakit.errors import ConfigError

_SECONDS = 1.0  # for all paths of a model; an honest pattern takes milliseconds


@functools.lru_cache(maxsize=512)
def _compiled(pattern: str) -> regex.Pattern[str]:
    return regex.compile(pattern)


def matching(pattern: str, paths: Iterable[str], what: str) -> list[str]:
    """Those of `paths` that `pattern` matches whole.

    Args:
        pattern: a regular expression, in the syntax of `re`.
        paths: module paths.
        what: the setting it stands in, for errors.

    Raises:
        ConfigError: it is no regular expression, or matching it takes too long.
    """
    try:
        compiled = _compiled(pattern)
    except regex.error as error:
        raise ConfigError(f"{what}: {pattern!r} is not a regular expression: {error}") from None
    end = time.monotonic() + _SECONDS
    try:
        return [path for path in paths if compiled.fullmatch(path, timeout=max(end - time.monotonic(), 1e-3))]
    except TimeoutError:
        raise ConfigError(
            f"{what}: {pattern!r} takes too long to match against the names of the modules (repetitions inside "
            "repetitions do that); write it in a simpler way, or list the names"
        ) from None


def ends(pattern: str) -> str:
    """The expression for a whole path of which `pattern` matches an end, as PEFT reads keys of its patterns."""
    return rf"(.*\.)?({pattern})"
