"""What adapters must share to be combined, and all of the result but its factors: config, whole tensors, base."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Literal

import torch

from lorakit.adapter import fingerprint
from lorakit.adapter.config import LoRAConfig
from lorakit.adapter.naming import exactly
from lorakit.adapter.spectrum import require_low_rank
from lorakit.adapter.value import TAKES_BIAS, Adapter
from lorakit.errors import AdapterError, bullet_list


def raise_all(what: str, problems: Sequence[str]) -> None:
    """One error for all `problems`; none, no error.

    Raises:
        AdapterError: there are some.
    """
    if problems:
        raise AdapterError(f"{what}: cannot be done:\n{bullet_list(problems)}")


def refuse_strangers(adapters: Sequence[Adapter], *, check_base: bool) -> None:
    """Adapters can be combined if they were made on one base, and a layer they share has one shape.

    Raises:
        AdapterError: with every difference.
    """
    first, problems = adapters[0], []
    for adapter in adapters:
        require_low_rank(adapter, "combine")
        adapter.require_no_prompt("combine")
    for number, adapter in enumerate(adapters[1:], 2):
        if check_base:
            problems += [f"adapters 1 and {number}: {difference}" for difference in _other_base(first, adapter)]
    if problems:
        problems.append("pass check_base=False if only the bases' values are known to differ")
    if len({adapter.config.alora_invocation_tokens for adapter in adapters}) > 1:
        problems.append(
            "alora_invocation_tokens differ, so they count for other tokens: activate the adapters together instead"
        )
    shapes: dict[str, tuple[int, str]] = {}
    for number, adapter in enumerate(adapters, 1):
        for path, f in adapter.factors.items():
            outputs, inputs = f.matrix_shape
            shape = f"{f.kind}, {inputs} to {outputs}, {len(f.blocks()[0])} group(s)"
            other, known = shapes.setdefault(path, (number, shape))
            if known != shape:
                problems.append(f"{path}: adapter {other} has a {known}, adapter {number} a {shape}")
    raise_all("combine", problems)


def _other_base(one: Adapter, other: Adapter) -> list[str]:
    if one.base is None or other.base is None:
        return []
    if one.base.structure and other.base.structure:
        return fingerprint.differences(one.base, other.base)
    names = [base.published or base.name for base in (one.base, other.base)]
    if all(names) and names[0] != names[1]:
        return [f"base: one was made on {names[0]}, the other on {names[1]}"]
    return []


def shell(adapters: Sequence[Adapter], weights: Sequence[float]) -> Adapter:
    """The combined adapter without its factors: a config that means the union of layers, whole tensors, the base.

    A trained tensor t_i stands for base + w_i (t_i - base). The base is not here, but where the weights of those that
    hold it add up to 1 it cancels: the sum is sum w_i t_i.

    Raises:
        AdapterError: whole tensors that cannot be added up; names them.
    """
    biases = _whole_tensors([a.biases for a in adapters], weights, "bias")
    if any(a.tokens for a in adapters) and len({a.config.trainable_tokens for a in adapters if a.tokens}) > 1:
        raise_all("combine", ["trainable_tokens differ between the adapters: activate them together instead"])
    tokens = _whole_tensors([a.tokens for a in adapters], weights, "token rows of")
    replaced = _whole_tensors([a.replaced for a in adapters], weights, "module to save")
    clash = sorted({p for a in adapters for p in a.factors if any(name.startswith(f"{p}.") for name in replaced)})
    raise_all("combine", [f"{path}: trained whole by one adapter and by low rank by another" for path in clash])
    base = next((a.base for a in adapters if a.base and a.base.structure), adapters[0].base)
    return Adapter(config=_config(adapters), biases=biases, replaced=replaced, tokens=tokens, base=base)


def _whole_tensors(
    holdings: Sequence[Mapping[str, torch.Tensor]], weights: Sequence[float], what: str
) -> dict[str, torch.Tensor]:
    combined: dict[str, torch.Tensor] = {}
    problems = []
    held: dict[str, list[tuple[int, torch.Tensor, float]]] = {}
    for number, (tensors, weight) in enumerate(zip(holdings, weights, strict=True), 1):
        for name, tensor in tensors.items():
            held.setdefault(name, []).append((number, tensor, weight))
    for name, holders in held.items():
        who = ", ".join(str(number) for number, _, _ in holders)
        total = sum(weight for _, _, weight in holders)
        _, first, _ = holders[0]
        if any(tensor.shape != first.shape for _, tensor, _ in holders):
            problems.append(f"{what} {name}: of different shapes in adapters {who}")
        elif not first.is_floating_point():  # a buffer, e.g. a batch norm's count
            if any(not torch.equal(tensor, first) for _, tensor, _ in holders):
                problems.append(
                    f"{what} {name}: counts differ between adapters {who}, so its statistics cannot be added"
                )
            combined[name] = first
        elif abs(total - 1.0) > 1e-9:
            problems.append(f"{what} {name}: held by adapter {who}, with weight {total:g} in all")
        elif len(holders) == 1:
            combined[name] = first
        else:
            combined[name] = torch.stack([weight * tensor.float() for _, tensor, weight in holders]).sum(0)
    if problems:
        problems.append(
            "these are whole tensors, not updates: without the base they can be added up only where the weights of "
            "those that hold them make 1. Choose such weights, or activate the adapters together on the model: "
            "handle.activate({name: weight, ...})"
        )
    raise_all("combine", problems)
    return combined


def _config(adapters: Sequence[Adapter]) -> LoRAConfig:
    """A config whose targets are the union of all layers; ranks and scales are for `with_factors` to say."""
    union = {path: None for adapter in adapters for path in adapter.factors}
    largest = max(adapters, key=lambda adapter: len(adapter.factors))
    config = largest.config
    if len(largest.factors) < len(union):
        kinds = {path: f.kind for a in adapters for path, f in a.factors.items()}
        stacks = tuple(path for path in union if kinds[path] == "experts")
        modules = exactly(path for path in union if path not in stacks) or ()
        exact = {"target_modules": modules, "target_parameters": stacks, "exclude_modules": None, "layers": None}
        config = replace(config, **exact)  # type: ignore[arg-type]
    saved = tuple(dict.fromkeys(name for adapter in adapters for name in adapter.config.modules_to_save))
    which = {adapter.config.bias for adapter in adapters}
    bias: Literal["all", "lora_only", "none"] = (
        "all" if "all" in which else "lora_only" if "lora_only" in which else "none"
    )
    if bias == "lora_only":
        trained = {path for a in adapters if a.config.bias == "lora_only" for path in a.factors}
        lacking = [f"{path}: its bias, if it has one, is in no adapter" for path in union if path not in trained]
        advice = ["bias lora_only means all layers of the combined adapter: activate the adapters together instead"]
        raise_all("combine", lacking and [*lacking, *advice])
    tokens = next((adapter.config.trainable_tokens for adapter in adapters if adapter.tokens), ())
    with_bias = next((adapter.config for adapter in adapters if adapter.config.lora_bias), None)
    if with_bias is not None:
        kinds = {path: f.kind for a in adapters for path, f in a.factors.items() if f.kind not in TAKES_BIAS}
        lacking = [f"{path}: B of a layer of kind {kind} has no bias" for path, kind in kinds.items()]
        advice = ["lora_bias means all layers of the combined adapter: activate the adapters together instead"]
        raise_all("combine", lacking and [*lacking, *advice])
        config = replace(config, lora_bias=True, init=with_bias.init)  # one of those that go together
    return replace(
        config, bias=bias, modules_to_save=saved, trainable_tokens=tokens, dropout=adapters[0].config.dropout
    )
