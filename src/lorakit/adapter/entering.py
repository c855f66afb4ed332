"""Virtual tokens before the rows of a batch, and the hook on a model by which prefixes enter its passes.

Virtual tokens that are embeddings stand in each row right before its own, behind what a shorter row is filled up with,
and are looked up by the model's own table. Those of prefixes are the first columns of the batch, masked where a row has
fewer; they never reach the model: the hook takes them out of the ids and puts keys and values into the cache instead.
Knows no packing, which brings prefixes itself.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle

from lorakit.core.active import ActiveState, Route
from lorakit.core.prompts import SoftPrompt
from lorakit.errors import AdapterError

OWN_PREFIX = "lorakit_layout"  # a pass with this keyword brings its prefix itself


class Prompts:
    """The soft prompts of one model, by slot, and the hook that is on the model while there are any."""

    def __init__(self, model: nn.Module, state: ActiveState) -> None:
        self._model = model
        self._state = state
        self._by_slot: dict[str, SoftPrompt] = {}
        self._next_id = 0
        self._hook: RemovableHandle | None = None

    def add(self, slot: str, prompt: SoftPrompt, vocabulary: int) -> None:
        """Give a prompt ids of its own, behind the vocabulary and those before it."""
        self._next_id = max(self._next_id, vocabulary)
        prompt.first = self._next_id
        self._next_id += prompt.length
        self._by_slot[slot] = prompt
        if self._hook is None:
            self._hook = self._model.register_forward_pre_hook(self._enter, with_kwargs=True)

    def remove(self, slot: str) -> None:
        """Forget the prompt of a slot, if it has one."""
        self._by_slot.pop(slot, None)
        if not self._by_slot and self._hook is not None:
            self._hook.remove()
            self._hook = None

    def __contains__(self, slot: str) -> bool:
        return slot in self._by_slot

    def __len__(self) -> int:
        return len(self._by_slot)

    @property
    def in_use(self) -> bool:
        """Whether any row has one."""
        return any(slot in self._by_slot for slot in self._state.current().slots_in_use)

    @property
    def prefix_in_use(self) -> bool:
        """Whether any row has one that is a prefix."""
        used = self._state.current().slots_in_use
        return any(slot in used for slot, prompt in self._by_slot.items() if prompt.is_prefix)

    def of_rows(self, rows: int) -> list[SoftPrompt | None]:
        """The prompt of each row of a batch.

        Raises:
            AdapterError: the route is of another number of rows.
        """
        selection = self._state.current()
        if isinstance(selection, Route):
            selection.check_batch(rows, selection.length)
            return [None if slot is None else self._by_slot.get(slot) for slot in selection.slots]
        return [self.of_all()] * rows

    def of_all(self) -> SoftPrompt | None:
        """The prompt that every row has.

        Raises:
            AdapterError: each row has its own.
        """
        selection = self._state.current()
        found = [self._by_slot[slot] for slot in selection.slots_in_use if slot in self._by_slot]
        if found and isinstance(selection, Route):
            raise AdapterError("inside route() each row has its own soft prompt: there is no one answer to what it is")
        assert len(found) < 2, "activate refuses it"
        return found[0] if found else None

    def before(self, ids: torch.Tensor, mask: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """A batch with its virtual tokens.

        Args:
            ids: (rows, n).
            mask: (rows, n) 1 where there is a token.

        Returns:
            (ids, mask), each with as many columns more as the front has.
        """
        prompts = self.of_rows(len(ids))
        columns = prefix_columns(prompts)
        longest = max((len(_looked_up(prompt)) for prompt in prompts), default=0)
        rows, masks = [], []
        for prompt, row, own in zip(prompts, ids.tolist(), mask.tolist(), strict=True):
            prefix, looked_up = _prefix(prompt), _looked_up(prompt)
            start = own.index(1) if 1 in own else len(own)
            # masked, so that any id will do
            fill, more = [0] * (columns - len(prefix)), [0] * (longest - len(looked_up))
            rows.append([*fill, *prefix, *more, *row[:start], *looked_up, *row[start:]])
            ones, own_ones = [1] * len(prefix), [1] * len(looked_up)
            masks.append([*fill, *ones, *more, *own[:start], *own_ones, *own[start:]])
        return ids.new_tensor(rows), mask.new_tensor(masks)

    def _enter(
        self, model: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        """Before each pass of the model: see that it begins with its virtual tokens, and let prefixes in.

        Raises:
            AdapterError: virtual tokens are missing, or keys and values cannot enter.
        """
        if not self.in_use or OWN_PREFIX in kwargs or _goes_on(kwargs):
            return None
        ids = args[0] if args else kwargs.get("input_ids")
        if not isinstance(ids, torch.Tensor):
            raise AdapterError(f"{type(model).__name__}: with a soft prompt in use a pass needs input_ids; {_HOW}")
        prompts = self.of_rows(len(ids))
        columns = prefix_columns(prompts)
        if not all(_are_there(prompt, row, columns) for prompt, row in zip(prompts, ids.tolist(), strict=True)):
            raise AdapterError(
                f"{type(model).__name__}: a soft prompt is in use, and a row does not begin with its virtual tokens; "
                f"{_HOW}"
            )
        if kwargs.get("attention_mask") is None and len({(len(_prefix(p)), len(_looked_up(p))) for p in prompts}) > 1:
            raise AdapterError(
                f"{type(model).__name__}: rows whose soft prompts differ in length need an attention_mask; {_HOW}"
            )
        return _with_prefix(model, args, kwargs, prompts, columns) if columns else None


def prefix_columns(prompts: Sequence[SoftPrompt | None]) -> int:
    """How many columns of a batch are prefixes'."""
    return max((len(_prefix(prompt)) for prompt in prompts), default=0)


def _prefix(prompt: SoftPrompt | None) -> range:
    """Virtual tokens that are keys and values."""
    return range(0) if prompt is None or not prompt.is_prefix else prompt.ids


def _looked_up(prompt: SoftPrompt | None) -> range:
    """Virtual tokens that are embeddings."""
    return range(0) if prompt is None or prompt.is_prefix else prompt.ids


def _are_there(prompt: SoftPrompt | None, row: list[int], columns: int) -> bool:
    """Whether a row has its virtual tokens, a prefix's at the end of the batch's `columns` for prefixes."""
    if prompt is None:
        return True
    if prompt.is_prefix:
        return row[columns - prompt.length : columns] == list(prompt.ids)
    if prompt.first not in row:
        return False
    start = row.index(prompt.first)
    return row[start : start + prompt.length] == list(prompt.ids)


_HOW = "call model(**adapters.prompted(input_ids)), generate by lorakit.generate, or use disabled()"


def _goes_on(kwargs: Mapping[str, Any]) -> bool:
    """Whether a pass goes on with sequences that began in another."""
    cache = kwargs.get("past_key_values", kwargs.get("cache_params"))
    if cache is None:
        return False
    try:
        return bool(cache.get_seq_length() > 0)
    except ValueError:  # transformers' answer where no layer has keys and values
        return bool(cache.has_previous_state())


def _with_prefix(
    model: Any,
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
    prompts: Sequence[SoftPrompt | None],
    count: int,
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The arguments of a pass with the block of prefixes, `count` columns, taken out, and their keys and values in the
    cache. The mask stays: it is of all keys.
    """
    from transformers import DynamicCache

    if model.training and any(getattr(module, "gradient_checkpointing", False) for module in model.modules()):
        raise AdapterError(
            f"{type(model).__name__}: its layers drop their cache, and with it a prefix, when activations are computed "
            "again: turn gradient checkpointing off, or choose soft_prompt prompt"
        )
    kwargs = dict(kwargs)
    mask, window = kwargs.get("attention_mask"), getattr(model.config, "sliding_window", None)
    if window and mask is not None and mask.shape[-1] > window and not bool(mask[:, count:].all()):
        raise AdapterError(
            f"{type(model).__name__}: its attention has a sliding window of {window} tokens, which would count what "
            "shorter rows are filled up with, behind a prefix: give rows of equal length, or use lorakit.generate"
        )
    names = [name for name in ("input_ids", "position_ids", "cache_position", "token_type_ids") if name in kwargs]
    for name in names:
        kwargs[name] = None if kwargs[name] is None else kwargs[name][..., count:]
    args = (args[0][..., count:], *args[1:]) if args else args
    cache = kwargs.get("past_key_values")
    if cache is None:
        cache = kwargs["past_key_values"] = DynamicCache(config=model.config)
    for number, (keys, values) in enumerate(_by_layer(prompts, count, model.dtype)):
        cache.update(keys, values, number)
    return args, kwargs


def _by_layer(
    prompts: Sequence[SoftPrompt | None], count: int, dtype: torch.dtype
) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Keys and values (rows, heads, count, width) for each layer; zeros, which are masked, where a row has fewer."""
    made = {id(p): p.by_layer(dtype).transpose(1, 2) for p in prompts if p is not None and p.is_prefix}
    like = next(iter(made.values()))  # (2 layers, heads, p, width)
    nothing = like.new_zeros(*like.shape[:2], 0, like.shape[3])
    rows = [made.get(id(prompt), nothing) for prompt in prompts]
    stacked = torch.stack([nn.functional.pad(row, (0, 0, count - row.shape[2], 0)) for row in rows], dim=1)
    return list(zip(stacked[0::2], stacked[1::2], strict=True))
