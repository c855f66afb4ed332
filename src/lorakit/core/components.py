"""Principal components of rows that come in batches, of which none is kept."""

from __future__ import annotations

import torch

from lorakit.core import lowrank

_EXACT_UP_TO = 512  # rows or columns that are decomposed exactly, in fp64
_PASSES = 2  # of the randomised decomposition of more, in fp32; the spectra of layers' inputs fall fast


class PrincipalComponents:
    """The directions in which rows vary most around their mean, by the incremental singular value decomposition of Ross
    et al. (IJCV 2008, section 3), as scikit-learn's IncrementalPCA and PEFT's: exact as long as batches are small and
    `count` directions hold all there is, else close.

    Args:
        count: directions that are kept.
        seed: of the random starts for large batches.

    Attributes:
        directions: (k, columns) fp64, orthonormal, the most telling first; k <= count.
        strengths: (k,) singular values of the centred rows.
        rows: how many there were.
    """

    def __init__(self, count: int, seed: int = 0) -> None:
        self.count = count
        self.directions: torch.Tensor | None = None
        self.strengths = torch.zeros(0, dtype=torch.float64)
        self.rows = 0
        self._mean: torch.Tensor | None = None
        self._squares = 0.0  # of all centred rows
        self._generator = torch.Generator().manual_seed(seed)

    @property
    def varying(self) -> int:
        """In how many directions rows vary at all, as far as is kept."""
        return int((self.strengths > 1e-6 * self.strengths[:1]).sum())

    @property
    def shares(self) -> torch.Tensor:
        """(k,) what part of all variance lies in each direction."""
        return self.strengths.square() / max(self._squares, torch.finfo(torch.float64).tiny)

    def add(self, rows: torch.Tensor) -> None:
        """Take more rows, (n, columns) of any floating dtype."""
        n, columns = rows.shape
        exact = min(n + 1 + self.count, columns) <= _EXACT_UP_TO
        wide = rows.detach().to("cpu", torch.float64 if exact else torch.float32)
        mean = wide.mean(0, dtype=torch.float64)
        parts = [wide - mean.to(wide.dtype)]
        if self._mean is not None and self.directions is not None:
            shift = (self.rows * n / (self.rows + n)) ** 0.5 * (self._mean - mean)
            parts.append(shift.to(wide.dtype).unsqueeze(0))
            mean = (self.rows * self._mean + n * mean) / (self.rows + n)
        self._squares += sum(float(part.square().sum(dtype=torch.float64)) for part in parts)
        if self.directions is not None:
            parts.append((self.strengths.unsqueeze(1) * self.directions).to(wide.dtype))
        stacked = torch.cat(parts).unsqueeze(0)
        count = min(self.count, *stacked.shape[1:])
        found = (
            lowrank.leading_svd(stacked, count)
            if exact
            else lowrank.subspace_svd(stacked, count, _PASSES, self._generator)
        )
        self.directions, self.strengths = found.V[0], found.S[0]
        self.rows, self._mean = self.rows + n, mean


def shared_ranks(shares: dict[str, torch.Tensor], budget: int) -> dict[str, int]:
    """Divide `budget` ranks among layers: one for each of the most telling directions of all layers together (EVA,
    arXiv 2410.07170, section 3.3).

    Args:
        shares: layer -> the share of its variance in each direction, at most as many as it may have ranks.
        budget: the sum of ranks.

    Returns:
        layer -> rank, which may be 0.
    """
    names = [name for name, own in shares.items() for _ in own]
    order = torch.cat(list(shares.values())).argsort(descending=True, stable=True)
    ranks = dict.fromkeys(shares, 0)
    for place in order[:budget].tolist():
        ranks[names[place]] += 1
    return ranks
