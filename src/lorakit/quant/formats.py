"""What a way of storing a matrix in few bits is, and which there are. Knows no tensors but plain ones."""

from __future__ import annotations

from typing import Protocol

import torch

Parts = tuple[torch.Tensor, ...]
"""What a stored matrix consists of: each part has the matrix's rows for its first dimension."""


class Format(Protocol):
    """A way of storing a matrix, row by row: rows can be taken out, put in another order and joined as they are."""

    @property
    def name(self) -> str:
        """As users and files call it."""
        ...

    def unpack(self, parts: Parts, out: torch.Tensor) -> None:
        """Write the numbers of some rows.

        Args:
            parts: of those rows.
            out: (rows, columns), fp32, in one piece.
        """
        ...

    def quantise(self, matrix: torch.Tensor, draws: torch.Generator | None = None) -> Parts:
        """A (rows, columns) matrix of any floating dtype, stored.

        Args:
            matrix: to store.
            draws: round each number to one of its two neighbours in the format, with the probabilities that make its
                mean exact; on the matrix's device. None: to the nearest.

        Raises:
            AdapterError: a format that is only read.
        """
        ...
