"""Whether an adapter fits a model, said in full before anything is put in."""

from __future__ import annotations

from collections.abc import Mapping

from torch import nn

from lorakit.adapter import fingerprint
from lorakit.adapter.prompts import PromptPlace, misfits
from lorakit.adapter.targets import Targets, module_at, readers
from lorakit.adapter.updates import expected_shapes
from lorakit.adapter.value import Adapter, BaseInfo
from lorakit.core.attention import AdaptedAttention
from lorakit.core.experts import AdaptedExperts
from lorakit.core.layer import AdaptedLayer, ReplacedModule
from lorakit.errors import AdapterMismatchError, TargetError, bullet_list


def refuse_overlap(targets: Targets, modules: Mapping[str, nn.Module], place: PromptPlace | None = None) -> None:
    """A module cannot be trained whole by one adapter and by a low-rank update of another (nor of the one it replaces:
    both are in for a moment). Neither can the input embedding where there is a soft prompt.

    Raises:
        TargetError: names such modules.
    """
    if place is not None and place.path in targets.replaced:
        raise TargetError(
            f"{place.path}: virtual tokens of the soft prompt stand beside it, so it cannot be trained whole too: "
            "leave it out of modules_to_save, or train the prompt alone"
        )
    low_rank = [*(t.path for t in targets.layers), *targets.biases, *targets.tokens]
    low_rank += [] if place is None else [place.path]
    low_rank += readers([*low_rank, *targets.replaced], modules)
    clash = [path for path in low_rank if isinstance(module_at(path, modules), ReplacedModule)]
    adapted = (AdaptedLayer, AdaptedAttention, AdaptedExperts)
    clash += [path for path in targets.replaced if isinstance(modules[path], adapted)]
    if clash:
        raise TargetError(
            "trained whole (modules_to_save) by one adapter and by low-rank update, bias or soft prompt by another, "
            f"which cannot share a model:\n{bullet_list(clash)}"
        )


def refuse_mismatch(
    adapter: Adapter,
    targets: Targets,
    modules: Mapping[str, nn.Module],
    model: str,
    here: BaseInfo | None,
    place: PromptPlace | None = None,
) -> None:
    """Every tensor of the value must have its place in the model, and every place its tensor.

    Args:
        adapter: the value.
        targets: what its config means in the model.
        modules: the model's, by path.
        model: the model's class, for the error.
        here: its fingerprint, to be compared with the base the adapter was made on; None: not compared.
        place: of the adapter's soft prompt, if it has one.

    Raises:
        AdapterMismatchError: lists everything.
    """
    expected = expected_shapes(adapter, targets, modules)
    found = {name: tuple(tensor.shape) for name, tensor in adapter.tensors().items() if name != "prompt"}
    problems = fingerprint.differences(adapter.base, here) if here and adapter.base else []
    problems += misfits(adapter.prompt, place) if adapter.prompt is not None and place is not None else []
    problems += [f"missing: {name} {shape}" for name, shape in expected.items() if name not in found]
    problems += [f"unexpected: {name} {shape}" for name, shape in found.items() if name not in expected]
    problems += [
        f"shape: {name} is {found[name]} in the adapter, {shape} in the model"
        for name, shape in expected.items()
        if name in found and found[name] != shape
    ]
    if problems:
        raise AdapterMismatchError(
            f"the adapter does not fit this {model}; nothing was loaded:\n{bullet_list(problems)}\n"
            "Load the base it was trained on"
            + (f" ({adapter.base.name})" if adapter.base and adapter.base.name else "")
            + "; in Python, check_base=False attaches it where only the base's values are known to differ."
        )
