"""Batches in which each row has its own adapter, as PEFT takes them: `model(..., adapter_names=[...])`."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch

from lorakit.compat.peft.errors import PeftValueError
from lorakit.compat.peft.parameters import LoraExperts
from lorakit.compat.peft.tuner import LoraModel
from lorakit.core.experts import keeps_contract

BASE = "__base__"


@contextlib.contextmanager
def routed(
    tuner: LoraModel, names: Sequence[str] | None, args: tuple[Any, ...], kwargs: Mapping[str, Any], copies: int = 1
) -> Iterator[None]:
    """Within the block each row uses its own adapter. Where adapters are switched off, the base for every row.

    Args:
        tuner: the model.
        names: one a row, "__base__" for none; None: nothing is changed.
        args: what the model will be called with.
        kwargs: the same.
        copies: rows the model will compute for each of the inputs (beams).

    Raises:
        PeftValueError: training mode, merged adapters, an unknown name, or a batch of another size.
    """
    if names is None:
        yield
        return
    state = tuner.handle.state
    if tuner.training:
        raise PeftValueError("Cannot pass `adapter_names` when the model is in training mode.")
    if state.merged:
        raise PeftValueError(
            "Cannot pass `adapter_names` when there are merged adapters, please call `unmerge_adapter` first."
        )
    unknown = sorted({*names} - {*tuner.peft_config, BASE})
    if unknown:
        raise PeftValueError(f"Trying to infer with non-existing adapter(s): {', '.join(unknown)}")
    modules = tuner.handle.adapted_modules().values()
    if any(isinstance(m, LoraExperts) and not keeps_contract(m) and {*names} & {*m.here()} for m in modules):
        raise PeftValueError("lora.ParamWrapper does not support mixed adapter batches yet.")
    batch = next((v for v in (*args, *kwargs.values()) if isinstance(v, torch.Tensor) and v.ndim), None)
    if batch is not None and len(batch) * copies != len(names):
        raise PeftValueError(
            "Length of `adapter_names` should be the same as the number of inputs, but got "
            f"{len(names) // copies} and {len(batch)} respectively."
        )
    if state.off or (state.in_block and not tuner.has_active_enabled_adapter):
        yield
        return
    with tuner.handle.route([None if name == BASE else name for name in names]):
        yield


def generate(tuner: LoraModel, names: Sequence[str] | None, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """The model's `generate`, each prompt with its own adapter in all its beams. An encoder sees each prompt once."""
    model: Any = tuner.model
    if names is None:
        return model.generate(*args, **kwargs)
    copies = _rows_per_prompt(model, kwargs)
    if copies > 1 and getattr(getattr(model, "config", None), "is_encoder_decoder", False):
        inputs = {name: kwargs[name] for name in ("input_ids", "attention_mask") if name in kwargs}
        with routed(tuner, names, args, kwargs):
            kwargs = {**kwargs, "encoder_outputs": model.get_encoder()(*args, **inputs, return_dict=True)}
    with routed(tuner, [name for name in names for _ in range(copies)], args, kwargs, copies):
        return model.generate(*args, **kwargs)


def _rows_per_prompt(model: Any, kwargs: Mapping[str, Any]) -> int:
    config: Any = kwargs.get("generation_config") or getattr(model, "generation_config", None)
    asked = (kwargs.get(name, getattr(config, name, None)) or 1 for name in ("num_beams", "num_return_sequences"))
    return int(max(asked))
