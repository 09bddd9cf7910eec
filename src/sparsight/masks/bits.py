"""A mask in one bit per weight, and hashes to compare masks and weights (blake2b, 32 hex digits).

On disk "pruned" means `weight == 0`, so a mask is always read from the zeros themselves.
"""

from __future__ import annotations

import hashlib

import torch

from sparsight import kernels
from sparsight.masks.matrix import mask_of

_BITS = torch.tensor([1, 2, 4, 8, 16, 32, 64, 128], dtype=torch.uint8)


def pack(mask: torch.Tensor) -> torch.Tensor:
    """Pack a boolean mask of any shape into uint8, eight entries a byte, lowest bit first; flat, padded with zeros."""
    if (packed := kernels.pack(mask)) is not None:
        return packed
    flat = mask.reshape(-1).to(torch.uint8)
    flat = torch.nn.functional.pad(flat, (0, -flat.numel() % 8))
    return (flat.view(-1, 8) * _BITS.to(mask.device)).sum(1, dtype=torch.uint8)


def unpack(packed: torch.Tensor, shape: tuple[int, ...] | torch.Size) -> torch.Tensor:
    """Undo `pack`: return a boolean tensor of `shape`."""
    count = 1
    for size in shape:
        count *= size
    if (mask := kernels.unpack(packed, count)) is not None:
        return mask.view(shape)
    bits = (packed.unsqueeze(1) & _BITS.to(packed.device)) != 0
    return bits.view(-1)[:count].view(shape)


def mask_hash(weight: torch.Tensor) -> str:
    """Hash the positions of a weight's non-zeros."""
    return packed_hash(pack(mask_of(weight)))


def packed_hash(packed: torch.Tensor) -> str:
    """Hash a packed mask; equals `mask_hash` of the weight that it was read from."""
    return _hash(packed)


def weight_hash(weight: torch.Tensor) -> str:
    """Hash a weight's bytes; the hash does not depend on the device."""
    return _hash(weight.detach().contiguous().reshape(-1).view(torch.uint8))


def _hash(data: torch.Tensor) -> str:
    return hashlib.blake2b(data.cpu().numpy(), digest_size=16).hexdigest()  # type: ignore[arg-type]
