"""Which tensors of a checkpoint make up a parameter of the model, where transformers renames or puts them together.

transformers stacks the experts of a layer, stored apart, into one parameter. Its own table says which keys go where; of
its operations those are understood that leave every number as it is: stacking, concatenating, renaming.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

Index = tuple[int | slice, ...]
Shape = tuple[int, ...]


def gathered(skeleton: Any, parameters: Mapping[str, Shape], keys: Mapping[str, Shape]) -> dict[str, dict[str, Index]]:
    """The parameters that a checkpoint holds in tensors of other names: name -> key -> the part that this tensor is.

    Args:
        skeleton: the transformers model.
        parameters: its own, by name.
        keys: the checkpoint's tensors.

    Returns:
        Those parameters that the tensors fill exactly; `parameter[index]` is of the tensor's shape.
    """
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightConverter, WeightRenaming, dot_natural_key, rename_source_key

    if not hasattr(skeleton, "base_model_prefix"):
        return {}
    table = get_model_conversion_mapping(skeleton)
    renamings = [entry for entry in table if isinstance(entry, WeightRenaming)]
    converters = [entry for entry in table if isinstance(entry, WeightConverter)]
    known = dict(parameters)
    converter_of = {pattern: each for each in converters for pattern in each.source_patterns}
    sources: dict[str, dict[str | None, list[str]]] = {}
    for key in sorted(keys, key=dot_natural_key):  # the order in which transformers stacks them
        name, pattern = rename_source_key(key, renamings, converters, skeleton.base_model_prefix, known)
        sources.setdefault(name, {}).setdefault(pattern, []).append(key)
    found = {}
    for name, by_pattern in sources.items():
        if name not in parameters:
            continue
        converter = converter_of.get(next(iter(by_pattern)) or "")
        if converter is not None:
            parts = _parts(converter, by_pattern, keys)
        else:
            parts = dict.fromkeys(by_pattern.get(None, ()), ())
        if _fill(parameters[name], parts, keys):
            found[name] = parts
    return found


def _parts(converter: Any, by_pattern: Mapping[str | None, list[str]], keys: Mapping[str, Shape]) -> dict[str, Index]:
    """key -> index of what a converter stacks or concatenates; empty where it does anything else."""
    from transformers.core_model_loading import Concatenate, MergeModulelist

    operations = list(converter.operations)
    stacks = isinstance(operations[0], MergeModulelist) and operations.pop(0).dim == 0
    understood = [type(each) for each in operations] in ([], [Concatenate])
    if not understood or not {*by_pattern} <= {*converter.source_patterns}:
        return {}
    along = operations[0].dim - stacks if operations else 0  # the dimension of a tensor that concatenating lengthens
    if along < 0 or (not operations and len(by_pattern) > 1):
        return {}
    parts: dict[str, Index] = {}
    start = 0
    for pattern in converter.source_patterns:
        of_pattern = by_pattern.get(pattern, [])
        for i, key in enumerate(of_pattern):
            if along >= len(keys[key]):
                return {}
            stop = start + keys[key][along]
            inside: Index = (*[slice(None)] * along, slice(start, stop)) if operations else ()
            parts[key] = (i, *inside) if stacks else inside
            if not stacks or i == len(of_pattern) - 1:
                start = stop
    return parts


def _fill(shape: Shape, parts: Mapping[str, Index], keys: Mapping[str, Shape]) -> bool:
    """Whether the tensors are the parameter: each has the shape of its part, and together they have its size."""
    whole = torch.empty(shape, device="meta")
    try:
        fit = all(tuple(whole[index].shape) == keys[key] for key, index in parts.items())
    except IndexError:
        return False
    return fit and bool(parts) and sum(torch.Size(keys[key]).numel() for key in parts) == whole.numel()
