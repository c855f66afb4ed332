"""Which layers of a model have one weight, and what PEFT's configs mean by that."""

from __future__ import annotations

import re
import warnings
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING

import torch
from torch import nn

from lorakit.adapter.patterns import matching
from lorakit.compat.peft.errors import PeftValueError, UnsupportedError
from lorakit.core.deltas import LayerUpdate, LoRA, Replacement
from lorakit.core.layer import base_modules
from lorakit.errors import nearest

if TYPE_CHECKING:
    from lorakit.compat.peft.config import LoraConfig


def input_embedding(model: nn.Module) -> nn.Module | None:
    """The embedding of a model's tokens: the one it names, or the only one."""
    getter = getattr(model, "get_input_embeddings", None)
    try:
        named = getter() if callable(getter) else None
    except (NotImplementedError, AttributeError):  # transformers' for models that do not say
        named = None
    embeddings = [module for _, module in base_modules(model) if isinstance(module, nn.Embedding)]
    return named if isinstance(named, nn.Module) else embeddings[0] if len(embeddings) == 1 else None


def tied_with(model: nn.Module, embedding: nn.Module | None) -> list[str]:
    """Paths of the modules that have the weight of `embedding`, itself included, in the model's order."""
    weight = None if embedding is None else embedding._parameters.get("weight")
    return [path for path, m in base_modules(model) if weight is not None and m._parameters.get("weight") is weight]


def tied_group(model: nn.Module) -> list[str]:
    """Paths of the layers with the input embedding's weight, that first; none where it is the only one, or the model's
    config says that nothing is tied.
    """
    embedding = input_embedding(model)
    if getattr(getattr(model, "config", None), "tie_word_embeddings", True) is False:
        return []
    group = tied_with(model, embedding)
    first = [path for path, module in base_modules(model) if module is embedding]
    return [*first, *(path for path in group if path not in first)] if len(group) > 1 else []


def tie(config: LoraConfig, model: nn.Module) -> None:
    """Where a config names one of several layers with one weight, and is to keep them tied, make it name them all.

    Warns, as PEFT does, where they are tied and it does not say so, and where it says so in vain.
    """
    group = tied_group(model)
    targets, saved = config.target_modules or (), config.modules_to_save or ()
    if isinstance(targets, str):
        meant = targets != "all-linear" and bool(matching(targets, group, "target_modules"))
    else:
        meant = bool(named(targets, group))
    if not config.ensure_weight_tying:
        if meant or named(saved, group):
            warnings.warn(
                "Model has `tie_word_embeddings=True` and a tied layer is part of the adapter, but "
                "`ensure_weight_tying` is not set to True: merging the adapter will give each layer its own weight",
                stacklevel=2,
            )
        return
    if config.trainable_token_indices:
        return  # tied whenever they can be
    if not group:
        warnings.warn(
            "You have requested `ensure_weight_tying`, but no tied modules were found in the model", stacklevel=2
        )
    elif named(saved, group):
        config.modules_to_save = [*saved, *(path for path in group if not named(saved, [path]))]
    elif not meant:
        warnings.warn(
            "You have requested `ensure_weight_tying`, but no tied modules are added in either `modules_to_save` or "
            "`target_modules`",
            stacklevel=2,
        )
    elif isinstance(targets, str) and len(matching(targets, group, "target_modules")) < len(group):
        config.target_modules = "|".join([f"(?:{targets})", *map(re.escape, group)])
    elif not isinstance(targets, str):
        config.target_modules = {*targets, *group}


class TiedLoRA(LoRA):
    """The LoRA of a layer with the weight of an embedding: the embedding's own, so that both weights stay one.

    Attributes:
        transposed: this layer multiplies where the embedding looks up.
    """

    def __init__(self, source: LoRA, *, transposed: bool) -> None:
        nn.Module.__init__(self)
        self._source = (source,)  # in a tuple, so that it is no submodule
        self.transposed = transposed
        self.bias = None  # embeddings have none
        self.stacked = False
        self.r = source.r

    @property
    def origin(self) -> LoRA:
        """The embedding's."""
        return self._source[0]

    @property
    def A(self) -> torch.Tensor:  # type: ignore[override]  # a parameter there
        """(r, in)."""
        return self.origin.B.T if self.transposed else self.origin.A

    @property
    def B(self) -> torch.Tensor:  # type: ignore[override]
        """(out, r)."""
        return self.origin.A.T if self.transposed else self.origin.B

    @property
    def A0(self) -> torch.Tensor | None:  # type: ignore[override]
        """(r, in), or None."""
        start = self.origin.B0 if self.transposed else self.origin.A0
        return start.T if self.transposed and start is not None else start

    @property
    def B0(self) -> torch.Tensor | None:  # type: ignore[override]
        """(out, r), or None."""
        start = self.origin.A0 if self.transposed else self.origin.B0
        return start.T if self.transposed and start is not None else start

    @property
    def alpha(self) -> float:  # type: ignore[override]
        """The embedding's."""
        return self.origin.alpha

    @property
    def s(self) -> float:
        """The embedding's; setting it sets that."""
        return self.origin.s

    @s.setter
    def s(self, value: float) -> None:
        self.origin.s = value

    @property
    def dropout(self) -> float:
        """The embedding's; setting it sets that."""
        return self.origin.dropout

    @dropout.setter
    def dropout(self, value: float) -> None:
        self.origin.dropout = value


def share(
    updates: Mapping[str, LayerUpdate | Replacement],
    group: Sequence[str],
    modules: Mapping[str, nn.Module],
    *,
    fresh: bool,
) -> None:
    """Let the updates of layers with one weight be one.

    Args:
        updates: path -> update; those of `group` are changed.
        group: the embedding, then what is tied to it.
        modules: the model's, by path.
        fresh: their values do not count yet.

    Raises:
        PeftValueError: their values differ.
    """
    here = [path for path in group if path in updates]
    for path in here[1:]:
        first, update = updates[here[0]], updates[path]
        pairs: list[tuple[torch.Tensor, torch.Tensor]] = []
        if isinstance(first, Replacement) and isinstance(update, Replacement):
            own = first.copy.get_parameter("weight")
            pairs = [(own, update.copy.get_parameter("weight"))]
            update.copy._parameters["weight"] = own
        elif isinstance(first, LayerUpdate) and isinstance(update, LayerUpdate) and first.lora and update.lora:
            tied = TiedLoRA(first.lora, transposed=not isinstance(modules[path], nn.Embedding))
            pairs = [(tied.A, update.lora.A), (tied.B, update.lora.B)]
            update.lora = tied
        if not fresh and not all(torch.equal(*pair) for pair in pairs):
            raise PeftValueError(f"{here[0]} and {path} are to stay tied (ensure_weight_tying), but differ in the file")


def named(names: Iterable[str], paths: Iterable[str]) -> list[str]:
    """The paths that end in one of the names."""
    names = list(names)
    return [path for path in paths if any(path == name or path.endswith(f".{name}") for name in names)]


def trainable_tokens(
    model: nn.Module, asked: Sequence[int] | Mapping[str, Sequence[int]] | None, *, saved: Sequence[str], ensure: bool
) -> tuple[int, ...]:
    """The tokens that `trainable_token_indices` means: rows of the input embedding, and of the layers tied to it.

    Args:
        model: the base.
        asked: the tokens, or for names of layers the tokens of each.
        saved: `modules_to_save`.
        ensure: `ensure_weight_tying`.

    Raises:
        PeftValueError: a name that is no layer's, a layer that is trained whole besides, tied layers with tokens that
        differ where they are to stay tied.
        UnsupportedError: rows of another layer.
    """
    if not asked:
        return ()
    embedding = input_embedding(model)
    group = tied_with(model, embedding)
    by_name = (
        asked if isinstance(asked, Mapping) else {path: asked for path, m in base_modules(model) if m is embedding}
    )
    if ensure and len(group) < 2:
        warnings.warn(
            "ensure_weight_tying=True but the model does not have tied weights (tie_word_embeddings=False). Weight "
            "tying will not be applied for trainable_token_indices.",
            stacklevel=2,
        )
    paths = [path for path, _ in base_modules(model)]
    for name in by_name:
        if named([name], saved) or name in saved:
            raise PeftValueError(
                "The embedding layer is already marked to be trained fully, either specify "
                f"`modules_to_save=[..., \"{name}\", ...]` or `trainable_tokens={{'{name}': x}}` but not both."
            )
        found = named([name], paths)
        if not found:
            guess = nearest(name, sorted({path.rpartition(".")[2] for path in paths}))
            hint = f" Did you mean {' or '.join(guess)}?" if guess else ""
            raise PeftValueError(f"Target modules {{{name!r}}} not found in the base model.{hint}")
        if not set(found) <= set(group):
            raise UnsupportedError(
                f"trainable_token_indices for {', '.join(found)}: this version trains rows of the input embedding"
            )
    tokens = {name: tuple(indices) for name, indices in by_name.items()}
    if len(set(tokens.values())) > 1:
        listed = ", ".join(f"{name}: {list(indices)}" for name, indices in tokens.items())
        if ensure:
            raise PeftValueError(
                "Cannot ensure weight tying when different token indices are specified for tied layers. Conflicting "
                f"layers: {listed}. Please use the same indices for all tied layers."
            )
        raise UnsupportedError(f"trainable_token_indices that differ for layers with one weight: {listed}")
    return next(iter(tokens.values()))
