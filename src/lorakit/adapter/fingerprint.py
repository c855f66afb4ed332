"""Which base an adapter belongs to: a digest of names and shapes, and a few hundred of its weights."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Callable, Sequence

import torch
from torch import nn

from lorakit.adapter.value import BaseInfo
from lorakit.quant.blocks import BLOCKS
from lorakit.quant.tensor import format_of

_TENSORS = 64
_PER_TENSOR = 4


def of(
    model: nn.Module,
    parameters: Sequence[tuple[str, torch.Tensor]],
    read: Callable[[str], torch.Tensor] | None = None,
) -> BaseInfo:
    """The fingerprint of a model's base parameters; reads a few hundred values, not all.

    The samples come from matrices spread evenly over the sorted names, at places that follow from each name, so two
    models with equal names and shapes are compared at equal places.

    Args:
        model: whose they are.
        parameters: (name, parameter).
        read: where the parameters are on the meta device: gives one that is to be sampled, by its name.
    """
    names = sorted((name, tuple(p.shape)) for name, p in parameters)
    structure = hashlib.sha256(repr(names).encode()).hexdigest()
    matrices = sorted(
        ((name, p) for name, p in parameters if p.ndim >= 2 and p.is_floating_point()), key=lambda pair: pair[0]
    )
    step = max(1, len(matrices) // _TENSORS)
    samples: list[float] = []
    for name, described in matrices[::step]:
        parameter = described if read is None else read(name)
        if parameter.device.type == "meta":
            continue
        digest = hashlib.sha256(name.encode()).digest()
        places = [int.from_bytes(digest[4 * i : 4 * i + 4], "big") % parameter.numel() for i in range(_PER_TENSOR)]
        # by coordinates: of a quantised weight only the rows they are in are unpacked
        at = torch.unravel_index(torch.tensor(places, device=parameter.device), parameter.shape)
        samples += [float(f"{value:.8g}") for value in parameter.detach()[at].float().tolist()]
    dtypes: Counter[torch.dtype] = Counter()
    for _, parameter in parameters:
        dtypes[parameter.dtype] += parameter.numel()
    dtype = str(dtypes.most_common(1)[0][0]).removeprefix("torch.") if dtypes else "none"
    name_or_path = getattr(model, "name_or_path", None) or None
    published = getattr(getattr(model, "config", None), "_name_or_path", None) or name_or_path
    architecture = next(c.__name__ for c in type(model).__mro__ if "lorakit" not in c.__module__)
    return BaseInfo(
        name=name_or_path,
        architecture=architecture,
        dtype=dtype,
        structure=structure,
        samples=tuple(samples),
        published=published,
        storage=_storage([parameter for _, parameter in parameters]),
    )


def _storage(parameters: Sequence[torch.Tensor]) -> str:
    """`BaseInfo.storage` of these weights."""
    formats = {name for name in map(format_of, parameters) if name is not None}
    return "blocks" if formats & BLOCKS.keys() else next(iter(sorted(formats)), "none")


def differences(made_on: BaseInfo, here: BaseInfo) -> list[str]:
    """Why `here` is not the base an adapter was made on; empty where it is.

    Equal dtypes must give equal samples. Across dtypes (trained in bf16, loaded in fp32) samples may differ by
    rounding to the narrower one: 2^-8 relative for bf16, 2^-11 for fp16.
    """
    if not made_on.structure:  # a file of another tool, which tells a name only
        return []
    problems = []
    if made_on.architecture != here.architecture:
        problems.append(f"base: made on a {made_on.architecture}, this is a {here.architecture}")
    if made_on.structure != here.structure:
        problems.append(
            "base: its parameters have other names or shapes than those of the model the adapter was made on"
        )
    elif len(made_on.samples) == len(here.samples):
        step = 0.0 if made_on.dtype == here.dtype else 2**-7
        differ = sum(
            abs(a - b) > step * max(abs(a), abs(b)) + (1e-7 if step else 0)
            for a, b in zip(made_on.samples, here.samples, strict=True)
        )
        if differ:
            named = [(role, base) for role, base in (("made on", made_on), ("this is", here)) if base.name]
            names = [
                f"{role} {base.name}" + (f" in {base.storage}" if base.storage != "none" else "")
                for role, base in named
            ]
            problems.append(
                f"base: same shapes, other weights: {differ} of {len(here.samples)} sampled weights differ"
                + (f" ({', '.join(names)})" if names else "")
            )
    return problems
