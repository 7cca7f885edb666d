"""Second-order rounding: codes that preserve a layer's output, not its weights, on the least-squares grid.

GPTQ (Frantar et al., 2022, arXiv:2210.17323) rounds the columns of a matrix one after another, and adjusts those that
follow to compensate for the error of those before. Here it starts from the weights that, on the inputs that the layer
gets in the quantized model, give what the original layer gives on its own inputs; of a layer whose output is added to a
residual stream, what the quantized stream lacks as well. Each group tries several grids. Where it is known how much
errors of the outputs matter, rows make up for each other's errors as columns do (as in YAQA, Tseng et al., 2025,
arXiv:2505.22988; here within blocks of rows).
"""

from dataclasses import dataclass, replace
from functools import partial

import numpy as np
import torch
from torch import Tensor

from .affine import QuantizationConfig, Quantized, quantize
from .devices import cholesky, on_either
from .packed_matrix import PackedMatrix, packed_matrix
from .rounding import round_columns, row_feedback

DAMPING = 0.01  # of the mean second moment, added to each: with as many frames as anyone may want
_MOST_DAMPING = 1.0  # with few: columns / frames, at most this
STEPS = (0.1, 1.0, 10.0)  # more damping, tried in turn where a factorization fails
FALLBACK = "lsq"  # the method without data, where none of it helps
_TILE = 1024  # columns of a symmetric product that are computed at a time


@dataclass(frozen=True)
class Moments:
    """Sums over a layer's inputs, both ``[columns, columns]``: of x̂ x̂ᵀ, and of x x̂ᵀ.

    x̂: the input in the quantized model. x: the same input in the original. residual: the sum of r x̂ᵀ, ``[rows,
    columns]``, where r is what the original's residual stream has in front of the layer and the quantized one lacks;
    None for a layer whose output is not added to a stream. frames: how many were summed, 0 if that is not known.
    """

    second: Tensor
    cross: Tensor
    residual: Tensor | None = None
    frames: int = 0


@dataclass(frozen=True)
class Inputs:
    """A layer's inputs themselves, both ``[frames, columns]``: what takes less work than moments if frames are few.

    original: x. quantized: x̂, the same in the quantized model. residual: r, ``[frames, rows]``; see ``Moments``.
    """

    original: Tensor
    quantized: Tensor
    residual: Tensor | None = None


@dataclass(frozen=True)
class Prepared:
    """What GPTQ needs of moments or inputs, whatever matrix reads them; H: the damped second moments.

    factor: R, upper triangular, with R Rᵀ = H. left, right: with ``W + (W @ left + residual) @ right`` the matrix whose
    output on x̂ is nearest to that of W on x; right is None where that takes two solves with R instead. residual: None
    for zero. finite: whether the moments are. definite: whether H is positive definite. Both are booleans on the
    device: nothing waits for them before ``check``.
    """

    added: Tensor
    factor: Tensor
    left: Tensor
    right: Tensor | None
    residual: Tensor | None
    finite: Tensor
    definite: Tensor

    def check(self) -> None:
        """Wait for the device; raise ValueError for moments that are not finite, LinAlgError if H has no factor."""
        if not bool(self.finite):
            raise ValueError("moments are not finite")
        if not bool(self.definite):
            raise torch.linalg.LinAlgError("the second moments are not positive definite")  # type: ignore[attr-defined]


@dataclass(frozen=True)
class Outcome:
    """A matrix as it was quantized, and how: on the GPU where a kernel rounded it, else on the CPU.

    damping: of the mean second moment, None where the matrix was quantized by its weights alone (``FALLBACK``). reason:
    why it is not the usual one, else empty.
    """

    matrix: PackedMatrix
    damping: float | None = DAMPING
    reason: str = ""


def gptq_with_retries(
    weight: Tensor,
    moments: Moments | Inputs,
    quantization: QuantizationConfig,
    storage: np.dtype[np.generic],
    prepared: dict[float, Prepared] | None = None,
    gradients: Tensor | None = None,
) -> Outcome:
    """Quantize with ``gptq``; with more damping where that fails, by the weights alone where nothing helps.

    prepared: what was prepared of the same moments for another matrix, by damping; added to. gradients: as for
    ``gptq``. Raises ValueError for weights that cannot be quantized at all.
    """
    reason, known, usual = "", {} if prepared is None else prepared, usual_damping(moments)
    for damping in (usual, *(step for step in STEPS if step > usual)):
        try:
            if damping not in known:
                known[damping] = prepare(moments, damping)
            if reason:
                known[damping].check()  # before anything is rounded in vain again
            matrix = gptq_prepared(weight, known[damping], quantization, storage, gradients)
            return Outcome(matrix, damping, reason)
        except torch.linalg.LinAlgError as error:  # type: ignore[attr-defined]
            reason = str(error)
            known.pop(damping)  # gigabytes
        except ValueError as error:
            reason = str(error)
            break
    array = np.ascontiguousarray(weight.float().cpu().numpy())
    plain = quantize(array, replace(quantization, method=FALLBACK), storage)
    return Outcome(packed_matrix(plain), None, reason)


def gptq(
    weight: Tensor,
    moments: Moments | Inputs,
    quantization: QuantizationConfig,
    storage: np.dtype[np.generic],
    damping: float | None = None,
    gradients: Tensor | None = None,
) -> Quantized:
    """Quantize a matrix ``[rows, columns]`` so that ``Ŵ x̂`` is as near to ``W x + r`` as possible.

    damping: a share of the mean second moment, added to each; by default ``usual_damping``. gradients: ``[blocks, 64,
    64]``, sums of g gᵀ for each block of 64 rows (the last one filled up with zeros), where g is the gradient of a loss
    at the matrix's output: errors count by what they do to the loss; None for all alike. The device is that of the
    moments. Errors and norms in the result are those of the weights. Raises ValueError for moments that are not finite
    or so large that the result is not, and LinAlgError where they are not positive definite.
    """
    matrix = gptq_prepared(weight, prepare(moments, damping), quantization, storage, gradients)
    wide = weight.to("cpu", torch.float64)
    error, norm = (float(values.square().sum()) for values in (wide - matrix.dequantized(quantization, "cpu"), wide))
    return replace(matrix.quantized(storage), squared_error=error, squared_norm=norm)


def usual_damping(moments: Moments | Inputs) -> float:
    """Return the damping that fits the number of frames: columns / frames, within bounds.

    With few frames, the weights would be fitted to what is particular to these.
    """
    columns = (moments.second if isinstance(moments, Moments) else moments.quantized).shape[1]
    frames = moments.frames if isinstance(moments, Moments) else len(moments.quantized)
    return min(_MOST_DAMPING, max(DAMPING, columns / frames)) if frames else DAMPING


def prepare(moments: Moments | Inputs, damping: float | None = None) -> Prepared:
    """Factor damped second moments; what ``gptq`` raises comes from ``Prepared.check``.

    Of inputs: (X̂ᵀX̂ + λ)⁻¹ on one side of X̂ᵀ is (X̂X̂ᵀ + λ)⁻¹ on the other, which is smaller where frames are few.
    """
    if isinstance(moments, Inputs):
        seen = moments.quantized
        second = torch.zeros((seen.shape[1], seen.shape[1]), dtype=seen.dtype, device=seen.device)
        add_symmetric_product(second, seen)
        checked = moments.original
    else:
        second, checked = moments.second, moments.cross
    residual = moments.residual
    sums = [each for each in (second, checked, residual) if each is not None]
    finite = torch.stack([torch.isfinite(each).all() for each in sums]).all()
    mean = second.diagonal().mean()
    share = usual_damping(moments) if damping is None else damping
    added = share * torch.where(mean > 0, mean, torch.ones_like(mean))
    factor, definite = _factor(second, added)
    if not isinstance(moments, Inputs):
        return Prepared(added, factor, moments.cross - second, None, residual, finite, definite)
    del second
    smaller = seen @ seen.T
    smaller.diagonal().add_(added)
    lower, also = cholesky(smaller)
    right = on_either(torch.cholesky_solve, seen, lower)
    left, residual = (moments.original - seen).T, None if residual is None else residual.T
    return Prepared(added, factor, left, right, residual, finite, definite & also)


def add_symmetric_product(total: Tensor, x: Tensor) -> None:
    """Add the upper triangle of ``x.T @ x`` to ``total``; what is below it is only partly computed."""
    for first in range(0, x.shape[1], _TILE):
        last = min(first + _TILE, x.shape[1])
        total[:last, first:last].addmm_(x[:, :last].T, x[:, first:last])


def mirror(total: Tensor) -> None:
    """Copy the upper triangle of a matrix ``[n, n]`` to the lower one."""
    for first in range(0, len(total), _TILE):
        last = first + _TILE
        square = total[first:last, first:last]
        square.copy_(square.triu() + square.triu(1).T)
        total[last:, first:last] = total[first:last, last:].T


def gptq_prepared(
    weight: Tensor,
    prepared: Prepared,
    quantization: QuantizationConfig,
    storage: np.dtype[np.generic],
    gradients: Tensor | None = None,
) -> PackedMatrix:
    """Quantize a matrix as ``gptq`` does, with moments that are prepared.

    A CUDA GPU rounds before it is known whether the moments can be used: else it would be idle while the processor asks
    for that, and then launches hundreds of kernels.
    """
    factor, left, residual = prepared.factor, prepared.left, prepared.residual
    if factor.device.type != "cuda":
        prepared.check()
    wide = weight.to(factor.device, factor.dtype)
    if prepared.right is None and residual is None and len(wide) > len(factor):  # solving for the smaller one first
        goal = torch.addmm(wide, wide, _solved(left, factor))
    else:
        lacking = wide @ left if residual is None else torch.addmm(residual, wide, left)
        right = prepared.right
        goal = _solved(lacking, factor).add_(wide) if right is None else torch.addmm(wide, lacking, right)
    feedback = None if gradients is None else row_feedback(gradients, factor.device).to(factor.dtype)
    try:
        matrix = round_columns(goal.contiguous(), factor, quantization, storage, feedback)
    except ValueError:  # groups are not finite: the moments may be why
        prepared.check()
        raise
    prepared.check()
    return matrix


def _solved(values: Tensor, factor: Tensor) -> Tensor:
    """Return ``values @ inv(R @ R.T)`` of an upper triangular R."""
    half = on_either(partial(torch.linalg.solve_triangular, upper=False, left=False), factor.T, values)
    return on_either(partial(torch.linalg.solve_triangular, upper=True, left=False), factor, half)


def _factor(second: Tensor, added: Tensor) -> tuple[Tensor, Tensor]:
    """Return R, upper triangular, with R Rᵀ = second + added, and whether there is one.

    Reads the upper triangle of ``second``.

    Its inverse is the upper Cholesky factor of the inverse, which GPTQ uses: with R, no matrix is inverted.
    """
    turned = second.flip(0, 1)
    turned.diagonal().add_(added)
    lower, definite = cholesky(turned)
    return lower.flip(0, 1), definite
