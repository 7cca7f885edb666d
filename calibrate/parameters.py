"""Quantized matrices whose codes, scales and biases are trainable parameters, rounded as they will be stored."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils import get_total_norm
from torch.utils.checkpoint import checkpoint

from ..convert.bundle.quantized_store import MatrixKey, QuantizedStore
from ..convert.tensorfile import DTYPES
from ..model.weights import Weights
from ..quant.affine import FLOAT32, QuantizationConfig, Quantized
from ..quant.packed_matrix import PackedMatrix, packed, packed_matrix, unpacked

BETAS = (0.9, 0.99)  # of Adam
CODES_RATE, SCALES_RATE = 1e-2, 1e-3  # learning rates: in codes; relative to a scale, of scales and biases
# Each step takes codes back to the nearest whole number by this share of the learning rate. Without it codes whose best
# value lies between two whole numbers gather at the border and cross it in every other step, which costs more than
# training gains in long runs (oscillation dampening as in arXiv:2203.11086, as a decay that is not part of the loss).
DAMPING = 0.3


@dataclass(frozen=True)
class TrainableMatrix:
    """A quantized matrix and its parameters.

    initial: scales and biases ``[rows, groups]`` before training. codes: floats ``[rows, groups, group_size]``. scales,
    biases: what is added to the initial ones, as a share of the scale.
    """

    quantization: QuantizationConfig
    dtype: str
    initial: tuple[Tensor, Tensor]
    codes: Tensor
    scales: Tensor
    biases: Tensor

    def scales_and_biases(self) -> tuple[Tensor, Tensor]:
        """Return scales and biases ``[rows, groups]`` as they will be stored."""
        (scale, bias), storage = self.initial, getattr(torch, DTYPES[self.dtype].name)
        scales, biases = scale * (1 + self.scales), bias + scale * self.biases
        return _straight_through(scales, scales.to(storage).float()), _straight_through(
            biases, biases.to(storage).float()
        )

    def rounded_codes(self) -> Tensor:
        """Return codes as they will be stored."""
        largest = (1 << self.quantization.bits) - 1
        inside = self.codes.clamp(-0.49, largest + 0.49)
        return _straight_through(inside, inside.round().clamp(0, largest))

    def weight(self) -> Tensor:
        """Return the dequantized matrix ``[rows, columns]``."""
        scales, biases = self.scales_and_biases()
        return (self.rounded_codes() * scales[..., None] + biases[..., None]).flatten(1)

    def quantized(self) -> Quantized:
        """Return it as it will be stored, in the memory of the processor; its error is not computed."""
        scales, biases = self.scales_and_biases()
        codes = self.rounded_codes().flatten(1).to(torch.uint8)
        return PackedMatrix(packed(codes, self.quantization.bits), scales, biases).quantized(DTYPES[self.dtype])


@dataclass(frozen=True)
class LowMemoryMatrix:
    """A quantized matrix and its parameters as in ``TrainableMatrix``, in 3 bytes per weight.

    codes: uint8 ``[rows, groups, group_size]``. offsets: bfloat16, what is added to them: at most about 0.5, where
    bfloat16 is fine enough (``carry``). Others as in ``TrainableMatrix``.
    """

    quantization: QuantizationConfig
    dtype: str
    initial: tuple[Tensor, Tensor]
    codes: Tensor
    offsets: Tensor
    scales: Tensor
    biases: Tensor

    def wide(self) -> TrainableMatrix:
        """Return the matrix in float32."""
        codes = self.codes.float() + self.offsets.float()
        return TrainableMatrix(self.quantization, self.dtype, self.initial, codes, self.scales, self.biases)

    @torch.no_grad()
    def carry(self) -> None:
        """Add the whole part of the offsets to the codes, so that a decay of offsets takes them to the nearest code."""
        top = (1 << self.quantization.bits) - 1
        codes = self.codes.to(self.offsets.dtype)
        whole = self.offsets.round().clamp_(-codes, top - codes)
        self.codes.add_(whole.to(torch.int8).view(torch.uint8))  # modulo 256
        self.offsets.sub_(whole)

    def weight(self) -> Tensor:
        """Return the dequantized matrix ``[rows, columns]``; it is computed again for its gradients.

        So that nothing of it in float32 is kept until the backward pass.
        """
        weight: Tensor = checkpoint(lambda: self.wide().weight(), use_reentrant=False, preserve_rng_state=False)
        return weight


def _straight_through(parameter: Tensor, rounded: Tensor) -> Tensor:
    """Return the rounded values, with the gradient of the unrounded ones (a straight-through estimator)."""
    return parameter + (rounded - parameter).detach()


def trainable_matrix(
    key: MatrixKey, quantization: QuantizationConfig, dtype: str, store: QuantizedStore, device: str
) -> TrainableMatrix:
    """Return a matrix of a quantized-weight store with trainable codes, scales and biases."""
    stored = packed_matrix(store.read(key, 0, store.rows(key), FLOAT32))
    codes = unpacked(stored.weight, quantization.bits).to(device).float()  # narrow on the way
    scale, bias = stored.scales.to(device), stored.biases.to(device)
    scales, biases = torch.zeros_like(scale, requires_grad=True), torch.zeros_like(bias, requires_grad=True)
    grouped = codes.reshape(len(codes), -1, quantization.group_size).requires_grad_()
    return TrainableMatrix(quantization, dtype, (scale, bias), grouped, scales, biases)


def low_memory_matrix(
    key: MatrixKey, quantization: QuantizationConfig, dtype: str, store: QuantizedStore, device: str
) -> LowMemoryMatrix:
    """Return the same in 16 bit."""
    matrix = trainable_matrix(key, quantization, dtype, store, device)
    codes = matrix.codes.detach().to(torch.uint8)
    offsets = torch.zeros_like(codes, dtype=torch.bfloat16, requires_grad=True)
    return LowMemoryMatrix(quantization, dtype, matrix.initial, codes, offsets, matrix.scales, matrix.biases)


def adam_for(matrices: Mapping[MatrixKey, TrainableMatrix]) -> torch.optim.Adam:
    """Return the optimizer of their parameters: scales and biases, then codes; see ``DAMPING``."""
    scales = [parameter for matrix in matrices.values() for parameter in (matrix.scales, matrix.biases)]
    codes = [matrix.codes for matrix in matrices.values()]
    adam = torch.optim.Adam(parameter_groups(scales, codes), betas=BETAS)

    @torch.no_grad()
    def dampen(*_: object) -> None:
        share = DAMPING * adam.param_groups[1]["lr"]
        for matrix in matrices.values():
            matrix.codes.lerp_(matrix.rounded_codes(), share)

    adam.register_step_post_hook(dampen)
    return adam


def parameter_groups(scales_and_biases: list[Tensor], codes: list[Tensor]) -> list[dict[str, Any]]:
    """Return what optimizers take, each kind with its learning rate; ``usual`` is the one before any schedule."""
    return [
        {"params": scales_and_biases, "lr": SCALES_RATE, "usual": SCALES_RATE},
        {"params": codes, "lr": CODES_RATE, "usual": CODES_RATE},
    ]


def set_learning_rate(adam: torch.optim.Adam, step: int, steps: int, warm_up: int = 1) -> None:
    """Set the learning rates of a step; see ``learning_rate_share``."""
    for group in adam.param_groups:
        group["lr"] = learning_rate_share(step, steps, warm_up) * group["usual"]


def learning_rate_share(step: int, steps: int, warm_up: int) -> float:
    """Return the share of the usual learning rates for a step: a linear warm-up, and a cosine decay to zero."""
    return 0.5 * (1 + math.cos(math.pi * step / steps)) * min(1.0, (step + 1) / warm_up)


def take_step(adam: torch.optim.Adam, loss: Tensor) -> bool:
    """Take a step down the gradient of a loss; return False, and change nothing, if either is not finite.

    A finite loss can have a gradient that is not finite: where a product overflows before a norm. One step along it
    would make all parameters meaningless.
    """
    if not bool(torch.isfinite(loss)):
        return False
    adam.zero_grad()
    torch.autograd.backward(loss)
    gradients = [one.grad for group in adam.param_groups for one in group["params"] if one.grad is not None]
    if not bool(torch.isfinite(get_total_norm(gradients, math.inf))):
        return False
    adam.step()
    return True


def trainable_weights(matrices: Mapping[MatrixKey, TrainableMatrix | LowMemoryMatrix], rest: Weights) -> Weights:
    """Return a way to read matrices: trainable ones as they are now, others from ``rest``."""

    def read(name: str, step: int | None) -> Tensor:
        key = (name, step or 0)
        return matrices[key].weight() if key in matrices else rest(name, step)

    return read
