"""The update of a parameter targeted by name, held as PEFT lays it: its tensors are what optimisers are given."""

from __future__ import annotations

import torch
from torch import nn

from lorakit.core.deltas import LoRA


class StackedLoRA(LoRA):
    """A LoRA of which A is (experts, r, in) and B (experts, out, r), as views of what is trained.

    Attributes:
        flat_A: (experts * r, in) parameter, one expert after the other.
        flat_B: (out, r * experts) parameter, of which every `experts`-th column is one expert's.
    """

    def __init__(self, lora: LoRA) -> None:
        nn.Module.__init__(self)
        self.experts = len(lora.A)
        self.flat_A = nn.Parameter(lora.A.detach().flatten(0, 1))
        self.flat_B = nn.Parameter(lora.B.detach().permute(1, 2, 0).flatten(1))
        self.bias = None
        self.register_buffer("A0", lora.A0)
        self.register_buffer("B0", lora.B0)
        self.stacked = True
        self.alpha, self.s, self.dropout, self.r = lora.alpha, lora.s, lora.dropout, lora.r

    @property
    def A(self) -> torch.Tensor:  # type: ignore[override]  # a parameter there
        """(experts, r, in)."""
        return self.flat_A.view(self.experts, self.r, -1)

    @property
    def B(self) -> torch.Tensor:  # type: ignore[override]
        """(experts, out, r)."""
        return self.flat_B.view(-1, self.r, self.experts).permute(2, 0, 1)


def parameter_name(lora: LoRA, letter: str) -> str:
    """The attribute of a LoRA that is the parameter A or B."""
    return f"flat_{letter}" if isinstance(lora, StackedLoRA) else letter
