"""Fold adapters into a GGUF file and store the result in the file's own formats, weight by weight.

The new file is the old one with other data for the weights that change: metadata, tokenizer and all other tensors are
the same bytes. Most of a small update is lost so, or turned into noise by stochastic rounding; how much, `FoldReport`
says for each weight. Knows GGUF files, not how users name models, and nothing of how a merge is judged.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import torch

from lorakit.adapter import folding
from lorakit.adapter.attach import AttachedAdapters
from lorakit.adapter.folding import FoldedLayer, FoldReport
from lorakit.checkpoints.gguf import GgufWeights
from lorakit.errors import MergeError, bullet_list
from lorakit.merging.stream import holding

_INSTEAD = "Merge into a dense model (without requantize, --requantize), or keep the adapter unmerged"


def requantise(weights: GgufWeights, handle: AttachedAdapters, target: Path, seed: int | None) -> FoldReport:
    """Write the merged file.

    Args:
        weights: of the base's file.
        handle: the adapters, attached to the base's skeleton, those to fold in active.
        target: the file to create.
        seed: of stochastic rounding; None: to the nearest.

    Raises:
        MergeError: a weight that changes cannot be stored in the file; lists all of them. Nothing is written.
        AdapterError: an update cannot be folded in.
        FileError: the file could not be written.
    """
    modules, selection = handle.adapted_modules(), handle.active_selection()
    folding.require_biases(modules, selection)
    owners = {
        name: path for path, module in modules.items() for name in folding.changed_parameters(path, module, selection)
    }
    staying = folding.staying_tied(handle.model, modules, selection)
    again = {name for group in staying for name in group[1:]}
    problems = [f"{name}: {reason}" for name in owners if (reason := weights.unwritable(name)) is not None]
    problems += [
        f"{name}: shares its tensor in the file with a weight that changes in another way, or not"
        for name in sorted(folding.shared_parameters(handle.model) & owners.keys())
        if not any(name in group for group in staying)
    ]
    if any(folding.trained_buffers(modules, selection)):
        problems.append("whole modules with statistics of their own (batch norms), which are no weights of the file")
    if problems:
        raise MergeError(f"{weights.file.path}: cannot take the merged weights:\n{bullet_list(problems)}\n{_INSTEAD}.")
    layers: list[FoldedLayer] = []

    def changes() -> Iterator[tuple[str, torch.Tensor]]:
        for path in dict.fromkeys(owners.values()):
            module = modules[path]
            with holding(module, path, lambda name: weights.stored(name, weights.own_dtype(name))):
                for (name, _, _), stored, layer in folding.folded_parameters(
                    {path: module}, selection, seed, rewrite=True
                ):
                    if name not in again:
                        layers.append(layer)
                        yield weights.raw(name, stored)

    weights.file.copied(target, changes())
    return FoldReport(layers=tuple(layers), dtypes=weights.kinds(owners), untied=())
