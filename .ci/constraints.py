"""Print constraints.txt: exact versions of what `lorakit[dev,bench]` needs, read from the environment this runs in."""

from __future__ import annotations

import re
import sys
from importlib.metadata import PackageNotFoundError, distribution

from packaging.requirements import Requirement

HEADER = """\
# Exact versions of everything lorakit[dev,bench] needs, so that an install today and one next year are the same.
# Made by `make constraints` from the environment the tests passed in; do not edit by hand.
"""


def closure(name: str, extras: frozenset[str]) -> dict[str, str]:
    """Distribution name -> version, of all that `name[extras]` needs here and that is installed; itself left out."""
    versions: dict[str, str] = {}
    seen: set[tuple[str, frozenset[str]]] = set()
    todo = [(name, extras)]
    while todo:
        current = todo.pop()
        if current in seen:
            continue
        seen.add(current)
        try:
            found = distribution(current[0])
        except PackageNotFoundError:  # needed on another platform only, or by an extra nobody asked for
            continue
        versions[canonical(found.metadata["Name"])] = found.version.partition("+")[0]  # 2.13.0+cpu is 2.13.0 elsewhere
        for line in found.requires or []:
            requirement = Requirement(line)
            marker = requirement.marker
            if marker is None or any(marker.evaluate({"extra": extra}) for extra in (*current[1], "")):
                todo.append((canonical(requirement.name), frozenset(requirement.extras)))
    del versions[canonical(name)]
    return versions


def canonical(name: str) -> str:
    """The one spelling of a distribution's name: lower case, hyphens."""
    return re.sub(r"[-_.]+", "-", name).lower()


if __name__ == "__main__":
    pins = closure("lorakit", frozenset({"dev", "bench"}))
    sys.stdout.write(HEADER + "".join(f"{name}=={version}\n" for name, version in sorted(pins.items())))
