"""Proof that training left the base as it was: a checksum over every bit of its weights. Knows no adapters."""

from __future__ import annotations

import hashlib

import torch

from lorakit.quant.tensor import stored_tensors

_CHUNK = 1 << 20  # elements; bounds the int64 copies
_VIEWS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}  # by bytes per element


@torch.no_grad()
def weights_checksum(model: torch.nn.Module) -> str:
    """A digest that changes if a weight or stored buffer of the base changes by one bit; adapters do not count.

    Per tensor: its elements as integers times fixed odd numbers, summed modulo 2^64, on the tensor's own device. Any
    single changed element changes the sum; several cancel by chance once in 2^64. A second's work where SHA-256 of the
    same bytes on the CPU takes many.
    """
    factors = torch.randint(-(2**62), 2**62, (_CHUNK,), generator=torch.Generator().manual_seed(0)) | 1
    by_device: dict[torch.device, torch.Tensor] = {}
    digest = hashlib.sha256()
    own = {name: tensor for name, tensor in model.state_dict().items() if "lorakit_updates." not in name}
    for name, tensor in (stored for each in sorted(own.items()) for stored in stored_tensors(*each)):
        own_factors = by_device.setdefault(tensor.device, factors.to(tensor.device))
        flat = tensor.detach().contiguous().view(-1).view(_VIEWS[tensor.element_size()])
        total = torch.zeros((), dtype=torch.int64, device=tensor.device)
        for chunk in torch.split(flat, _CHUNK):
            total = total * 31 + (chunk.long() * own_factors[: len(chunk)]).sum()
        digest.update(f"{name}|{tensor.dtype}|{tuple(tensor.shape)}|{int(total)}\n".encode())
    return digest.hexdigest()
