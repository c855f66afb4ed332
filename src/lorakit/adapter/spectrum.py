"""The singular values of an adapter's updates, layer by layer: how much each changes, and in how many directions.

Of what multiplies the input: a bias of B (`lora_bias`) adds the same whatever comes in, and counts in none of the
figures.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from lorakit.adapter.value import Adapter
from lorakit.core import lowrank
from lorakit.errors import AdapterError


@dataclass(frozen=True, kw_only=True, eq=False)
class LayerSpectrum:
    """The update s B A of one layer, by its singular values.

    Attributes:
        shape: (outputs, inputs) of the update as a matrix (`Factors.matrix_shape`).
        r: rank of the factors.
        groups: of a grouped convolution, or experts; else 1.
        singular_values: (k,) fp64, descending, scale included; of all groups or experts together, k <= r (of each
        expert).
    """

    shape: tuple[int, int]
    r: int
    groups: int
    singular_values: torch.Tensor

    @property
    def energy(self) -> float:
        """Sum of squared singular values."""
        return lowrank.energy(self.singular_values)

    @property
    def frobenius_norm(self) -> float:
        """Root of the energy: the length of the update."""
        return math.sqrt(self.energy)

    @property
    def stable_rank(self) -> float:
        """Energy over the largest squared singular value."""
        return lowrank.stable_rank(self.singular_values)

    @property
    def effective_rank(self) -> float:
        """exp of the entropy of the singular values as shares of their sum."""
        return lowrank.effective_rank(self.singular_values)

    def to_dict(self) -> dict[str, Any]:
        """All figures, for JSON."""
        return {
            "shape": list(self.shape),
            "r": self.r,
            "groups": self.groups,
            "energy": self.energy,
            "frobenius_norm": self.frobenius_norm,
            "stable_rank": self.stable_rank,
            "effective_rank": self.effective_rank,
            "singular_values": self.singular_values.tolist(),
        }


@dataclass(frozen=True, kw_only=True, eq=False)
class Spectrum:
    """The spectra of all layers of an adapter.

    Attributes:
        layers: module path -> its spectrum, in the adapter's order.
    """

    layers: Mapping[str, LayerSpectrum]

    def __getitem__(self, path: str) -> LayerSpectrum:
        return self.layers[path]

    def __iter__(self) -> Iterator[str]:
        return iter(self.layers)

    def __len__(self) -> int:
        return len(self.layers)

    @property
    def energy(self) -> float:
        """Sum over layers."""
        return math.fsum(layer.energy for layer in self.layers.values())

    @property
    def frobenius_norm(self) -> float:
        """Root of the energy of all layers."""
        return math.sqrt(self.energy)

    def to_dict(self) -> dict[str, Any]:
        """All figures, for JSON."""
        return {
            "energy": self.energy,
            "frobenius_norm": self.frobenius_norm,
            "layers": {path: layer.to_dict() for path, layer in self.layers.items()},
        }


def spectrum(adapter: Adapter) -> Spectrum:
    """The singular values of every layer, from the factors.

    Raises:
        AdapterError: its updates are not products of two factors.
    """
    require_low_rank(adapter, "spectrum")
    layers = {}
    for path, f in adapter.factors.items():
        S = decomposed(adapter, path).S
        layers[path] = LayerSpectrum(
            shape=f.matrix_shape, r=f.r, groups=S.shape[0], singular_values=S.flatten().sort(descending=True).values
        )
    return Spectrum(layers=layers)


def decomposed(adapter: Adapter, path: str) -> lowrank.SVD:
    """The singular value decomposition of the update of the layer at `path`, scale included."""
    f = adapter.factors[path]
    A, B = f.blocks()
    return lowrank.svd(A.detach(), B.detach(), adapter.scale(path))


def require_low_rank(adapter: Adapter, what: str) -> None:
    """Refuse an adapter whose updates are more than s B A.

    Raises:
        AdapterError: it is such a one.
    """
    delta = str(adapter.config.delta)
    if delta != "lora":
        raise AdapterError(
            f"{what}: works on updates s B A; this adapter's are {delta!r}, which depend on the base too"
        )
