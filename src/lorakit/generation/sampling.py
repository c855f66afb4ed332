"""Choosing the next token at random, as a function of integers: (seed, row, step). Knows no model."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch


class RowSampler:
    """A logits processor that leaves one token possible in each row: the one drawn for (seed, row, step).

    transformers draws for a whole batch from one evolving generator, so that a row's text depends on its neighbours.
    Here each row has its own numbers, so it reads the same alone, in any batch, and in any order.

    Args:
        seed: of the whole call.
        rows: for each row of the batch, its number in the whole call.
        steps: largest number of tokens to draw.
        temperature: > 0; divides the logits.
        top_p: in (0, 1]; only the most probable tokens that together reach this probability are drawn (nucleus
            sampling, arXiv 1904.09751).
        prompt_length: tokens before the first generated one, padding included.
    """

    def __init__(
        self, seed: int, rows: Sequence[int], steps: int, temperature: float, top_p: float, prompt_length: int
    ) -> None:
        self.prompt_length = prompt_length
        self.temperature = temperature
        self.top_p = top_p
        # Philox is counter-based: its key is the pair (seed, row), its counter the step.
        draws = [np.random.Generator(np.random.Philox(key=[seed, row])).random(steps) for row in rows]
        self.uniform = torch.from_numpy(np.stack(draws))  # (rows, steps), float64 in [0, 1)

    def keep(self, rows: Sequence[int]) -> None:
        """Go on with only these rows of the batch."""
        self.uniform = self.uniform[list(rows)]

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        """Scores (rows, V) with all but the drawn token of each row at -inf."""
        step = input_ids.shape[1] - self.prompt_length
        chosen = draw(scores, self.uniform[:, step], self.temperature, self.top_p)
        return torch.full_like(scores, -torch.inf).scatter_(1, chosen.to(scores.device)[:, None], 0.0)


def draw(logits: torch.Tensor, uniform: torch.Tensor, temperature: float, top_p: float) -> torch.Tensor:
    """Sample by inverting the cumulative distribution.

    Args:
        logits: (rows, V).
        uniform: (rows,), float64 in [0, 1), on the CPU.
        temperature: > 0.
        top_p: in (0, 1].

    Returns:
        (rows,) token ids, on the CPU.
    """
    # float64 on the CPU: cumulative sums over 100,000 tokens, and MPS has no float64
    probabilities = torch.softmax(logits.to("cpu", torch.float64) / temperature, dim=-1)
    if top_p < 1:
        ordered, tokens = probabilities.sort(dim=-1, descending=True, stable=True)
        before = ordered.cumsum(-1) - ordered
        probabilities = torch.zeros_like(probabilities).scatter_(1, tokens, ordered.where(before < top_p, 0.0))
    cumulative = probabilities.cumsum(-1)
    # right=True: the first token whose cumulative probability exceeds the draw; never one of probability 0
    chosen = torch.searchsorted(cumulative, uniform[:, None] * cumulative[:, -1:], right=True)[:, 0]
    return chosen.clamp_(max=logits.shape[-1] - 1)
