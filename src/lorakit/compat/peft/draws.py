"""Starting values drawn as PEFT draws them: the same numbers, in the same order, from torch's global generator.

So a script that sets a seed starts from PEFT's tensors, and what it draws afterwards (its data, its dropout) is what it
would be with PEFT. lorakit's own initialisation depends on a seed and each layer's path alone; see core/initializers.
"""

from __future__ import annotations

import math

import torch
from torch import nn

from lorakit.compat.peft.errors import PeftValueError
from lorakit.compat.peft.stacked import StackedLoRA, parameter_name
from lorakit.core.deltas import LoRA


@torch.no_grad()
def draw(lora: LoRA, init: bool | str, *, lookup: bool) -> None:
    """Fill A and B of one layer, and B's bias if it has one.

    Args:
        lora: of a matrix, a convolution, a lookup or a parameter.
        init: PEFT's `init_lora_weights`: True, False, "gaussian" or "orthogonal". What begins as a part of the weight
        stays as it is; what PEFT's constructors draw before is drawn.
        lookup: the layer is an embedding.
    """
    own_A, own_B = (getattr(lora, parameter_name(lora, letter)) for letter in "AB")
    shape_A, shape_B, r = own_A.shape, own_B.shape, lora.r
    if lora.A0 is not None:
        _as_a_layer(shape_A), _as_a_layer(shape_B)
        return
    if lookup:
        A, B = torch.randn(shape_A), torch.randn(shape_B)
        if init is not False:
            A.zero_()
            B.normal_()
    else:  # PEFT's constructors draw both before its initialisation draws again
        A, B = _as_a_layer(shape_A), _as_a_layer(shape_B)
        if init == "orthogonal" and isinstance(lora, StackedLoRA) and lora.experts > 1:
            raise PeftValueError('init_lora_weights="orthogonal" is not defined for stacks of matrices')
        if lora.bias is not None:
            bound = 1 / math.sqrt(math.prod(shape_B[1:]))
            lora.bias.copy_(torch.empty(shape_B[0]).uniform_(-bound, bound))
        if init == "orthogonal":
            basis, _ = torch.linalg.qr(torch.randn(r, r))
            A = (torch.randn(shape_A[1], r // 2) @ basis[0::2]).T / 10
            B = torch.randn(r // 2, shape_B[0]).T @ basis[1::2] / 10
        elif init is not False:
            A = nn.init.normal_(A, std=1 / r) if init == "gaussian" else _as_a_layer(shape_A)
            B.zero_()
            if lora.bias is not None:
                lora.bias.zero_()
    own_A.copy_(A)
    own_B.copy_(B)


def _as_a_layer(shape: torch.Size) -> torch.Tensor:
    return nn.init.kaiming_uniform_(torch.empty(shape), a=math.sqrt(5))
