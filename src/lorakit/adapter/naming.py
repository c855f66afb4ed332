"""`target_modules` that mean given layers and no others, as every library reads them: names, or an expression where
names could mean more. Knows no model.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Sequence

from lorakit.adapter.config import PRESETS


def names_meaning(paths: Collection[str], known: Collection[str] | None, *, least: int = 1) -> str | tuple[str, ...]:
    """`target_modules` that mean these layers and no other module.

    Args:
        paths: what is to be meant.
        known: paths of all modules of the base; None: unknown, so that only whole paths are safe.
        least: parts that a name has at least.

    Returns:
        The shortest ends of paths that nothing else has, or an expression for the whole paths where there are none.
    """
    everything = {*(known or ()), *paths}
    blocks = {path.rsplit(".", depth)[0] for path in everything for depth in range(1, path.count(".") + 1)}
    meant = set(paths)
    meant_by_others = {end for path in (everything | blocks) - meant for end in ends_of(path)}
    names = []
    for path in paths:
        # a number is a place in a list, where modules without weights stand too
        short = [end for end in ends_of(path) if end.count(".") + 1 >= least and not end.split(".")[0].isdigit()]
        free = [end for end in reversed(short) if end not in meant_by_others] if known is not None else []
        if not free and (path in meant_by_others or (known is None and "." not in path)):
            return exactly(paths)
        names.append(free[0] if free else path)
    return names_alone(tuple(dict.fromkeys(names)))


def ends_of(path: str) -> list[str]:
    """The path and all its ends on whole names, longest first: what a name in a list of targets may match it by."""
    parts = path.split(".")
    return [".".join(parts[start:]) for start in range(len(parts))]


def exactly(paths: Iterable[str]) -> str:
    """A regular expression that means these paths and no others, whatever model it is held against."""
    return _no_preset("|".join(re.escape(path) for path in paths))


def names_alone(targets: str | Sequence[str]) -> str | tuple[str, ...]:
    """`target_modules` of a library that has no presets but "all-linear", for ours: where a name is a preset's word
    ("attention"), an expression that means the module of that name.
    """
    if isinstance(targets, str):
        return targets if targets == "all-linear" else _no_preset(targets)
    if not any(name in PRESETS for name in targets):
        return tuple(targets)
    return rf"(.*\.)?({'|'.join(re.escape(name) for name in targets)})"


def _no_preset(expression: str) -> str:
    return f"({expression})" if expression in PRESETS else expression
