"""Matrices whose codes, scales and biases are moved by gradients, as they will be stored."""

import math
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from ..convert.bundle.quantized_store import MatrixKey, QuantizedStore
from ..convert.tensorfile import DTYPES
from ..model.reference import Weights
from ..quant.affine import QuantizationConfig, Quantized, unpack
from ..quant.gptq import assemble

CODES, SIDES = 1e-2, 1e-3  # learning rates: in codes, and relative to a scale


@dataclass(frozen=True)
class TrainableMatrix:
    """A matrix under way. codes: floats ``[rows, groups, group_size]``. scales, biases: relative, from 0 on."""

    quantization: QuantizationConfig
    dtype: str
    first: tuple[Tensor, Tensor]
    codes: Tensor
    scales: Tensor
    biases: Tensor

    def sides(self) -> tuple[Tensor, Tensor]:
        """Return scales and biases ``[rows, groups]`` as they will be stored."""
        (scale, bias), storage = self.first, getattr(torch, DTYPES[self.dtype].name)
        found = (scale * (1 + self.scales), bias + scale * self.biases)
        return _as_if(found[0], found[0].to(storage).float()), _as_if(found[1], found[1].to(storage).float())

    def rounded(self) -> Tensor:
        """Return codes as they will be stored."""
        top = (1 << self.quantization.bits) - 1
        inside = self.codes.clamp(-0.49, top + 0.49)
        return _as_if(inside, inside.round().clamp(0, top))

    def weight(self) -> Tensor:
        """Return the matrix ``[rows, columns]``."""
        scale, bias = self.sides()
        return (self.rounded() * scale[..., None] + bias[..., None]).flatten(1)

    def finished(self, weight: Tensor) -> Quantized:
        """Return it as it will be stored; weight: what it stands for."""
        scale, bias = self.sides()
        codes = self.rounded().flatten(1).to(torch.uint8)
        wide = weight.to(scale.device, torch.float32)
        return assemble(wide, codes, scale, bias, self.quantization, DTYPES[self.dtype])


def _as_if(moved: Tensor, value: Tensor) -> Tensor:
    """Return a value whose gradient goes to ``moved``."""
    return moved + (value - moved).detach()


def begin(
    part: MatrixKey,
    quantization: QuantizationConfig,
    dtype: str,
    store: QuantizedStore,
    device: str,
    codes_too: bool = True,
) -> TrainableMatrix:
    """Return a solved matrix, ready to be moved: its scales and biases, and its codes as well or not."""
    held = store.read(part, 0, store.rows(part), np.dtype(np.float32))
    codes = torch.from_numpy(unpack(held.weight, quantization.bits)).float().to(device)
    scale, bias = (torch.from_numpy(side.astype(np.float32)).to(device) for side in (held.scales, held.biases))
    moved = (torch.zeros_like(scale, requires_grad=True), torch.zeros_like(bias, requires_grad=True))
    grouped = codes.reshape(len(codes), -1, quantization.group_size).requires_grad_(codes_too)
    return TrainableMatrix(quantization, dtype, (scale, bias), grouped, *moved)


def adam_for(tuned: Mapping[MatrixKey, TrainableMatrix]) -> torch.optim.Adam:
    """Return what moves them: sides, then codes where they are moved."""
    sides = [side for one in tuned.values() for side in (one.scales, one.biases)]
    codes = [one.codes for one in tuned.values() if one.codes.requires_grad]
    groups = [{"params": sides, "lr": SIDES, "usual": SIDES}, {"params": codes, "lr": CODES, "usual": CODES}]
    return torch.optim.Adam(groups[: 2 if codes else 1], betas=(0.9, 0.99))


def set_rate(adam: torch.optim.Adam, step: int, steps: int, warm_up: int = 1) -> None:
    """Let the learning rates fall to nothing over the steps, as a cosine does, after some in which they rise."""
    share = 0.5 * (1 + math.cos(math.pi * step / steps)) * min(1.0, (step + 1) / warm_up)
    for group in adam.param_groups:
        group["lr"] = share * group["usual"]


def take_step(adam: torch.optim.Adam, loss: Tensor) -> bool:
    """Move what is tuned against the gradient of a loss; return False, and move nothing, if they are not finite.

    A finite loss can have a gradient that is not: where a product overflows before a norm. One step by it would make
    all that is tuned meaningless.
    """
    if not bool(torch.isfinite(loss)):
        return False
    adam.zero_grad()
    torch.autograd.backward(loss)
    gradients = [one.grad for group in adam.param_groups for one in group["params"] if one.grad is not None]
    if not all(bool(torch.isfinite(gradient).all()) for gradient in gradients):
        return False
    adam.step()
    return True


def weights_of(tuned: Mapping[MatrixKey, TrainableMatrix], rest: Weights) -> Weights:
    """Return a way to read matrices, those under way as they are now."""

    def read(name: str, step: int | None) -> Tensor:
        part = (name, step or 0)
        return tuned[part].weight() if part in tuned else rest(name, step)

    return read
