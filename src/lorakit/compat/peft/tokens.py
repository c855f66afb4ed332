"""Embeddings of which rows are trained, and heads tied to them, as PEFT shows them: `TrainableTokensWrapper`."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, cast

import torch
from torch import nn

from lorakit.compat.peft import views
from lorakit.compat.peft.layers import BaseTunerLayer
from lorakit.compat.peft.lora_layers import AuxiliaryTrainingWrapper
from lorakit.core.deltas import LayerUpdate, TokenRows
from lorakit.core.layer import AdaptedLayer


class TrainableTokensWrapper(AuxiliaryTrainingWrapper, AdaptedLayer):
    """An embedding of which adapters train rows, or a layer tied to it, with PEFT's attributes.

    Attributes:
        lorakit_tied: the embedding, where this is a layer tied to it; in a tuple, so that it is no submodule.
    """

    lorakit_tied: tuple[TrainableTokensWrapper, ...] = ()
    in_features = views.Width(1)
    out_features = views.Width(0)
    adapter_layer_names = ("token_adapter.trainable_tokens_delta",)
    other_param_names = ("token_adapter.token_indices", "token_adapter.trainable_tokens_original")

    def rows(self) -> dict[str, TokenRows]:
        """Adapter name -> its rows."""
        held = {name: cast("LayerUpdate", update).tokens for name, update in BaseTunerLayer.here(self).items()}
        return {name: tokens for name, tokens in held.items() if tokens is not None}

    @property
    def _adapters(self) -> set[str]:
        return set(self.rows())

    def delta(self) -> views.ParametersByName:
        """Adapter name -> its rows as a parameter; the very same container for all that are tied."""
        if self.lorakit_tied:
            return self.lorakit_tied[0].delta()
        found: views.ParametersByName = self._container("trainable_tokens_delta", views.ParametersByName)
        found.show({name: tokens.rows for name, tokens in self.rows().items()})
        return found

    @property
    def token_adapter(self) -> TrainableTokensLayer:
        """The layer that PEFT has inside."""
        return TrainableTokensLayer(self)

    @property
    def original_module(self) -> nn.Module:
        """The base's module."""
        return self.as_base()

    def parts(self) -> Iterator[tuple[str, nn.Module]]:
        """`token_adapter`."""
        yield "token_adapter", self.token_adapter

    def base_prefix(self) -> str:
        """Where the module's own tensors are."""
        return "token_adapter.base_layer."

    def key_map(self) -> Iterator[tuple[str, str]]:
        """(PEFT's, our) tensor names."""
        for name in self._parameters:
            yield self.base_prefix() + name, name
        for slot, name in self.lorakit_state.names.items():
            if slot in self.lorakit_updates:
                yield f"token_adapter.trainable_tokens_delta.{name}", f"lorakit_updates.{slot}.tokens.rows"


class TrainableTokensLayer(nn.Module):
    """A view of a `TrainableTokensWrapper` as the layer that PEFT has inside it.

    Attributes:
        base_layer: the embedding without adapters.
        trainable_tokens_delta: adapter name -> (n, dim) parameter, the whole new rows.
    """

    adapter_layer_names = ("trainable_tokens_delta",)
    other_param_names = ("token_indices", "trainable_tokens_original")

    def __init__(self, wrapper: TrainableTokensWrapper) -> None:
        super().__init__()
        self._wrapper = (wrapper,)  # in a tuple, so that it is no submodule
        self.base_layer = wrapper.as_base()
        self.trainable_tokens_delta = wrapper.delta()

    def get_base_layer(self) -> nn.Module:
        """`base_layer`."""
        return self.base_layer

    @property
    def weight(self) -> torch.Tensor:
        """The base's."""
        return self.base_layer.get_parameter("weight")

    @property
    def token_indices(self) -> dict[str, list[int]]:
        """Adapter name -> the tokens whose rows it trains."""
        return {name: tokens.indices.tolist() for name, tokens in self._wrapper[0].rows().items()}

    @property
    def trainable_tokens_original(self) -> dict[str, torch.Tensor]:
        """Adapter name -> the base's rows of these tokens."""
        return {name: self.weight.detach()[tokens.indices] for name, tokens in self._wrapper[0].rows().items()}

    @property
    def tied_adapter(self) -> TrainableTokensLayer | None:
        """The embedding's, where this is of a layer tied to it."""
        tied = self._wrapper[0].lorakit_tied
        return tied[0].token_adapter if tied else None

    @property
    def active_adapters(self) -> list[str]:
        """Active adapters."""
        return self._wrapper[0].active_adapters

    @property
    def active_adapter(self) -> list[str]:
        """Active adapters."""
        return self.active_adapters

    @property
    def merged_adapters(self) -> list[str]:
        """Adapters folded into the embedding."""
        return self._wrapper[0].merged_adapters

    @property
    def merged(self) -> bool:
        """Whether any is."""
        return bool(self.merged_adapters)

    @property
    def disable_adapters(self) -> bool:
        """Whether adapters are switched off."""
        return self._wrapper[0].disable_adapters

    def get_merged_weights(self, active_adapters: list[str]) -> torch.Tensor:
        """(vocabulary, dim) with the rows of these adapters in it."""
        weight = self.weight
        for name in active_adapters:
            tokens = self._wrapper[0].rows()[name]
            weight = weight.index_copy(0, tokens.indices, tokens.rows.to(weight))
        return weight

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The wrapper's."""
        return self._wrapper[0](*args, **kwargs)
