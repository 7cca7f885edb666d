"""Quantized matrices as tensors, where they were computed: on a GPU nothing waits for them to travel."""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from .affine import QuantizationConfig, Quantized, pack, unpack

_WORDS = 1 << 20  # of eight codes, that are packed or unpacked at a time: 64 MB for each 64-bit copy of the codes


@dataclass(frozen=True)
class PackedMatrix:
    """A quantized matrix.

    weight: uint8 ``[rows, columns * bits / 8]``, the bytes of packed words. scales, biases: float32 ``[rows, groups]``,
    values that their storage dtype holds.
    """

    weight: Tensor
    scales: Tensor
    biases: Tensor

    def quantized(self, storage: np.dtype[np.generic]) -> Quantized:
        """Return it in the memory of the processor, scales and biases as they are stored; its errors are not known."""
        scales, biases = (side.float().cpu().numpy().astype(storage) for side in (self.scales, self.biases))
        return Quantized(self.weight.cpu().numpy().view("<u4"), scales, biases, 0.0, 0.0, 0, 0)

    def dequantized(self, quantization: QuantizationConfig, device: str) -> Tensor:
        """Return its values ``[rows, columns]`` in float32, as ``dequantize`` does, on a device."""
        scales, biases = (side.to(device)[..., None] for side in (self.scales, self.biases))
        codes = unpacked(self.weight.to(device) if device == "cuda" else self.weight, quantization.bits)
        grouped = codes.to(device).float().reshape(*scales.shape[:2], quantization.group_size)
        return grouped.mul_(scales).add_(biases).flatten(1)


def packed_matrix(quantized: Quantized) -> PackedMatrix:
    """Return the tensors of a quantized matrix; its words are shared."""
    scales, biases = (torch.from_numpy(side.astype(np.float32)) for side in (quantized.scales, quantized.biases))
    return PackedMatrix(torch.from_numpy(np.ascontiguousarray(quantized.weight).view(np.uint8)), scales, biases)


def packed(codes: Tensor, bits: int) -> Tensor:
    """Return codes, uint8 ``[rows, columns]``, as the bytes of packed words ``[rows, columns * bits / 8]``."""
    if codes.device.type != "cuda":  # others lack, or err in, some of the operations
        return torch.from_numpy(pack(codes.cpu().numpy(), bits).view(np.uint8))
    return packed_on_device(codes, bits)


def unpacked(weight: Tensor, bits: int) -> Tensor:
    """Return what ``packed`` was given: on a CUDA GPU if the bytes are there, else in the processor's memory."""
    if weight.device.type != "cuda":
        return torch.from_numpy(unpack(weight.cpu().numpy().view("<u4"), bits))
    return unpacked_on_device(weight, bits)


def packed_on_device(codes: Tensor, bits: int) -> Tensor:
    """Pack codes on their device, as ``packing.pack_rows`` does."""
    shifts, places = bits * torch.arange(8, device=codes.device), 8 * torch.arange(bits, device=codes.device)
    parts = torch.split(codes.reshape(-1, 8), _WORDS)
    done = [((part.long() << shifts).sum(1, keepdim=True) >> places).to(torch.uint8) for part in parts]
    return torch.cat(done).reshape(len(codes), -1)


def unpacked_on_device(weight: Tensor, bits: int) -> Tensor:
    """Return what ``packed_on_device`` was given."""
    shifts, places = bits * torch.arange(8, device=weight.device), 8 * torch.arange(bits, device=weight.device)
    parts, largest = torch.split(weight.reshape(-1, bits), _WORDS), (1 << bits) - 1
    done = [((part.long() << places).sum(1, keepdim=True) >> shifts & largest).to(torch.uint8) for part in parts]
    return torch.cat(done).reshape(len(weight), -1)
