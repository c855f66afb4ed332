"""The adapted embedding: it looks up virtual tokens of soft prompts too, whose ids follow those of its vocabulary."""

from __future__ import annotations

from typing import Any, cast

import torch

from lorakit.core.deltas import LayerUpdate
from lorakit.core.layer import AdaptedLayer
from lorakit.core.prompts import SoftPrompt


class AdaptedEmbedding(AdaptedLayer):
    """A table of embeddings with low-rank updates, trained rows and soft prompts of any number of adapters."""

    def forward(self, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        """As `AdaptedLayer`; virtual tokens of prompts in use give the prompts' vectors, to which no update adds.

        Args:
            x: ids, of the vocabulary or virtual.
            *args: as the layer's own forward takes them.
            **kwargs: likewise.
        """
        prompts = self._looked_up()
        if not prompts:
            return super().forward(x, *args, **kwargs)
        known = x
        for prompt in prompts:  # theirs alone: any other id outside the vocabulary is an error as ever
            known = known.masked_fill(prompt.owns(x), 0)
        y = super().forward(known, *args, **kwargs)
        for prompt in prompts:
            y = prompt.put_into(y, x)
        return y

    def _looked_up(self) -> list[SoftPrompt]:
        """Prompts in use that are looked up here: all but prefixes."""
        updates = self.lorakit_updates
        slots = self.lorakit_state.current().slots_in_use
        held = [cast("LayerUpdate", updates[slot]) for slot in slots if slot in updates]
        return [update.prompt for update in held if update.prompt is not None and not update.prompt.is_prefix]
