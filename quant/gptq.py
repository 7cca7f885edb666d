"""Second-order rounding: codes that preserve a layer's output, not its weights, on the least-squares grid.

GPTQ (Frantar et al., 2022, arXiv:2210.17323) rounds the columns of a matrix one after another, and adjusts those that
follow to compensate for the error of those before. Here it starts from the weights that, on the inputs that the layer
gets in the quantized model, give what the original layer gives on its own inputs.
"""

from collections.abc import Callable
from concurrent.futures import Executor, ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import partial

import numpy as np
import torch
from torch import Tensor

from .affine import QuantizationConfig, Quantized, pack, quantize

DAMPING = 0.01  # of the mean second moment, added to each
STEPS = (0.1, 1.0, 10.0)  # more damping, tried in turn where a factorization fails
FALLBACK = "lsq"  # the method without data, where none of it helps
_ROWS = 1024  # of a group, for which one thread computes scales and biases at a time


@dataclass(frozen=True)
class Moments:
    """Sums over a layer's inputs, both ``[columns, columns]``: of x̂ x̂ᵀ, and of x x̂ᵀ.

    x̂: the input in the quantized model. x: the same input in the original.
    """

    second: Tensor
    cross: Tensor


@dataclass(frozen=True)
class Outcome:
    """A quantized matrix, and how it was quantized.

    damping: of the mean second moment, None where the matrix was quantized by its weights alone (``FALLBACK``). reason:
    why it is not ``DAMPING``, else empty.
    """

    quantized: Quantized
    damping: float | None = DAMPING
    reason: str = ""


def gptq_with_retries(
    weight: Tensor, moments: Moments, quantization: QuantizationConfig, storage: np.dtype[np.generic]
) -> Outcome:
    """Quantize with ``gptq``; with more damping where that fails, by the weights alone where nothing helps.

    Raises ValueError for weights that cannot be quantized at all.
    """
    reason = ""
    for damping in (DAMPING, *STEPS):
        try:
            return Outcome(gptq(weight, moments, quantization, storage, damping), damping, reason)
        except torch.linalg.LinAlgError:  # type: ignore[attr-defined]
            reason = "the second moments are not positive definite"
        except ValueError as error:
            reason = str(error)
            break
    array = np.ascontiguousarray(weight.float().cpu().numpy())
    return Outcome(quantize(array, replace(quantization, method=FALLBACK), storage), None, reason)


def gptq(
    weight: Tensor,
    moments: Moments,
    quantization: QuantizationConfig,
    storage: np.dtype[np.generic],
    damping: float = DAMPING,
) -> Quantized:
    """Quantize a matrix ``[rows, columns]`` so that ``Ŵ x̂`` is as near to ``W x`` as possible.

    damping: a share of the mean second moment, added to each. The device is that of the moments. Errors and norms in
    the result are those of the weights. Raises ValueError for moments that are not finite or so large that the result
    is not, and LinAlgError where they are not positive definite.
    """
    second = moments.second
    if not bool(torch.isfinite(second).all()) or not bool(torch.isfinite(moments.cross).all()):
        raise ValueError("moments are not finite")
    wide = weight.to(second.device, second.dtype)
    mean = second.diagonal().mean()
    added = damping * (mean if mean > 0 else torch.ones_like(mean))
    factor = _factor(second, added)
    goal = on_either(torch.cholesky_solve, (wide @ moments.cross + added * wide).T, factor).contiguous()
    inverse = on_either(torch.cholesky_inverse, factor)
    del factor
    errors = on_either(partial(torch.linalg.cholesky, upper=True), inverse)
    del inverse
    codes, scales, biases = _round(goal, errors, quantization, storage)
    return assemble(wide, codes, scales, biases, quantization, storage)


def on_either(function: Callable[..., Tensor], *values: Tensor) -> Tensor:
    """Compute on the values' device, or on the CPU where that lacks the operation; the result is where they are."""
    try:
        return function(*values)
    except NotImplementedError:
        return function(*(value.cpu() for value in values)).to(values[0].device)


def _factor(second: Tensor, added: Tensor) -> Tensor:
    """Return the lower Cholesky factor of damped moments, without a copy of them: they are half a gigabyte."""
    diagonal = second.diagonal().clone()
    second.diagonal().add_(added)
    try:
        factor = on_either(torch.linalg.cholesky, second)
    finally:
        second.diagonal().copy_(diagonal)
    return factor


def _round(
    goal: Tensor, errors: Tensor, quantization: QuantizationConfig, storage: np.dtype[np.generic]
) -> tuple[Tensor, Tensor, Tensor]:
    """Round column by column; return codes, scales and biases, ``[rows, ...]``.

    goal: ``[columns, rows]``, overwritten. errors: the upper Cholesky factor of the inverse moments. Each group's
    scales and biases are the least-squares ones of its weights as they are when its first column is rounded.
    """
    columns, rows = goal.shape
    size, top = quantization.group_size, (1 << quantization.bits) - 1
    codes = torch.empty((columns, rows), dtype=torch.uint8, device=goal.device)
    scales = torch.empty((columns // size, rows), dtype=goal.dtype, device=goal.device)
    biases = torch.empty_like(scales)
    with ThreadPoolExecutor(torch.get_num_threads(), thread_name_prefix="ppx-grid") as pool:
        for first in range(0, columns, size):
            group = goal[first : first + size]
            scale, bias = grid(group.T, quantization, storage, pool)
            residuals = torch.empty_like(group)
            for index in range(size):
                column = first + index
                code = ((group[index] - bias) / scale).round_().clamp_(0, top)
                code = torch.where(scale == 0, torch.zeros_like(code), code)
                codes[column] = code.to(torch.uint8)
                residuals[index] = (group[index] - (code * scale + bias)) / errors[column, column]
                group[index:] -= torch.outer(errors[column, column : first + size], residuals[index])
            goal[first + size :] -= errors[first : first + size, first + size :].T @ residuals
            scales[first // size], biases[first // size] = scale, bias
    return codes.T.contiguous(), scales.T.contiguous(), biases.T.contiguous()


def grid(
    group: Tensor, quantization: QuantizationConfig, storage: np.dtype[np.generic], pool: Executor
) -> tuple[Tensor, Tensor]:
    """Return scale and bias of each row of a group ``[rows, group_size]``: least squares, as they are stored."""
    array = np.ascontiguousarray(group.float().cpu().numpy())
    plain = QuantizationConfig(quantization.bits, quantization.group_size, "lsq")
    batches = [array[first : first + _ROWS] for first in range(0, len(array), _ROWS)]
    quantized = list(pool.map(lambda rows: quantize(rows, plain, storage), batches))
    scale, bias = (
        torch.from_numpy(np.concatenate(arrays).astype(np.float32).reshape(-1)).to(group.device, group.dtype)
        for arrays in ([one.scales for one in quantized], [one.biases for one in quantized])
    )
    return scale, bias


def _double(values: Tensor) -> Tensor:
    return (values.cpu() if values.device.type == "mps" else values).double()  # which has no float64


def assemble(
    weight: Tensor,
    codes: Tensor,
    scales: Tensor,
    biases: Tensor,
    quantization: QuantizationConfig,
    storage: np.dtype[np.generic],
) -> Quantized:
    """Return codes, scales and biases ``[rows, ...]`` as a quantized matrix, with its error against ``weight``.

    Scales and biases must be values that their storage dtype holds.
    """
    dequantized = codes.reshape(*scales.shape, -1) * scales[..., None] + biases[..., None]
    difference = weight.to(dequantized.device) - dequantized.flatten(1)
    error, norm = (float(_double(values).square().sum()) for values in (difference, weight))
    scale, bias = (values.float().cpu().numpy().astype(storage) for values in (scales, biases))
    return Quantized(pack(codes.cpu().numpy(), quantization.bits), scale, bias, error, norm, 0, 0)
