"""Packing of codes that are on a CUDA GPU, where they are: less travels, and the processor is free."""

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from .affine import pack, unpack

_WORDS = 1 << 20  # of eight codes, that are packed or unpacked at a time: 64 MB for each 64-bit copy of the codes


def packed(codes: Tensor, bits: int) -> NDArray[np.uint32]:
    """Return codes, uint8 ``[rows, columns]``, as packed words ``[rows, columns * bits / 32]``."""
    if codes.device.type != "cuda":  # others lack, or err in, some of the operations
        return pack(codes.cpu().numpy(), bits)
    return packed_bytes(codes, bits).cpu().numpy().view("<u4")


def unpacked(weight: NDArray[np.uint32], bits: int, device: str) -> Tensor:
    """Return the codes ``[rows, columns]`` of packed words, on a device."""
    if device != "cuda":
        return torch.from_numpy(unpack(weight, bits)).to(device)
    return unpacked_bytes(torch.from_numpy(np.ascontiguousarray(weight).view(np.uint8)).to(device), bits)


def packed_bytes(codes: Tensor, bits: int) -> Tensor:
    """Return codes as bytes ``[rows, columns * bits / 8]``, as ``packing.pack_rows`` does."""
    shifts, places = bits * torch.arange(8, device=codes.device), 8 * torch.arange(bits, device=codes.device)
    parts = torch.split(codes.reshape(-1, 8), _WORDS)
    done = [((part.long() << shifts).sum(1, keepdim=True) >> places).to(torch.uint8) for part in parts]
    return torch.cat(done).reshape(len(codes), -1)


def unpacked_bytes(packed: Tensor, bits: int) -> Tensor:
    """Return what ``packed_bytes`` was given."""
    shifts, places = bits * torch.arange(8, device=packed.device), 8 * torch.arange(bits, device=packed.device)
    parts, largest = torch.split(packed.reshape(-1, bits), _WORDS), (1 << bits) - 1
    done = [((part.long() << places).sum(1, keepdim=True) >> shifts & largest).to(torch.uint8) for part in parts]
    return torch.cat(done).reshape(len(packed), -1)
