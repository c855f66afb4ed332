"""What virtual tokens stand for: the p trained vectors of a soft prompt, as embeddings (prompt tuning, arXiv
2104.08691; P-tuning, 2103.10385) or as keys and values of every layer (prefix tuning, 2101.00190; P-tuning v2,
2110.07602). Knows neither where they enter a model nor how they begin.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import nn


class KeyValues(NamedTuple):
    """What every layer of a model keeps of a token: keys and values (heads, width) in each of `layers`."""

    layers: int
    heads: int
    width: int

    @property
    def numbers(self) -> int:
        """Of one token, in all layers."""
        return self.layers * 2 * self.heads * self.width


class SoftPrompt(nn.Module):
    """p virtual tokens.

    Attributes:
        values: (p, width) parameter, fp32: the vectors; with an encoder, what it makes them of.
        encoder: (p, ...) -> (p, width), trained instead of the vectors themselves; None: they are trained.
        key_values: of a prefix, how a vector is divided among layers, PEFT's way: layer by layer its keys, then its
        values, head by head. None: the vectors are embeddings.
        first: id of the first virtual token.
    """

    first: int = -1

    def __init__(
        self, values: torch.Tensor, *, encoder: nn.Module | None = None, key_values: KeyValues | None = None
    ) -> None:
        super().__init__()
        self.values = nn.Parameter(values)
        self.encoder = encoder
        self.key_values = key_values

    def forward(self) -> torch.Tensor:
        """The vectors (p, width), fp32."""
        vectors: torch.Tensor = self.values if self.encoder is None else self.encoder(self.values)
        return vectors

    @property
    def length(self) -> int:
        """p."""
        return len(self.values)

    @property
    def is_prefix(self) -> bool:
        """Whether it enters in attention and not as embeddings."""
        return self.key_values is not None

    @property
    def ids(self) -> range:
        """Ids of its virtual tokens."""
        return range(self.first, self.first + self.length)

    def owns(self, ids: torch.Tensor) -> torch.Tensor:
        """Which of `ids` are its virtual tokens."""
        return (ids >= self.first) & (ids < self.first + self.length)

    def put_into(self, y: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
        """Embeddings `y` (..., d) of `ids` (...), with its own where they are its virtual tokens."""
        places = (ids - self.first).clamp(0, self.length - 1)  # no wait for the device, whether there are any
        mixed: torch.Tensor = torch.where(self.owns(ids).unsqueeze(-1), F.embedding(places, self()).to(y.dtype), y)
        return mixed

    def by_layer(self, dtype: torch.dtype) -> torch.Tensor:
        """(2 * layers, p, heads, width): keys of layer i at 2 i, its values at 2 i + 1."""
        assert self.key_values is not None, "only a prefix has keys and values"
        layers, heads, width = self.key_values
        vectors: torch.Tensor = self()
        return vectors.to(dtype).view(self.length, 2 * layers, heads, width).transpose(0, 1)

    def extra_repr(self) -> str:
        """What it is, for print(model)."""
        return f"p={self.length}" + (", prefix" if self.is_prefix else "")


def prefix_encoder(inputs: int, hidden: int, width: int) -> nn.Sequential:
    """Prefix tuning's reparametrisation: (p, inputs) -> (p, width)."""
    return nn.Sequential(nn.Linear(inputs, hidden), nn.Tanh(), nn.Linear(hidden, width))


def p_tuning_mlp(width: int, hidden: int) -> nn.Module:
    """P-tuning's encoder as PEFT has it: (p, width) -> (p, width)."""
    return nn.Sequential(
        nn.Linear(width, hidden), nn.ReLU(), nn.Linear(hidden, hidden), nn.ReLU(), nn.Linear(hidden, width)
    )


class LSTMEncoder(nn.Module):
    """P-tuning's encoder as its paper has it: the vectors as a sequence through an LSTM in both directions, then each
    through two layers.
    """

    def __init__(self, width: int, hidden: int, layers: int) -> None:
        super().__init__()
        self.lstm = nn.LSTM(width, hidden, num_layers=layers, bidirectional=True, batch_first=True)
        self.head = nn.Sequential(nn.Linear(2 * hidden, 2 * hidden), nn.ReLU(), nn.Linear(2 * hidden, width))

    def forward(self, values: torch.Tensor) -> torch.Tensor:
        """(p, width) -> (p, width)."""
        encoded: torch.Tensor = self.head(self.lstm(values[None])[0])
        return encoded[0]
