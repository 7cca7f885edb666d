"""Rounding of a matrix column by column: each group tries several grids, and rows may make up for each other.

The steps of GPTQ (``gptq``) after its moments are factored.
"""

import logging
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import cache
from threading import Lock, Thread
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from .affine import STORAGE, QuantizationConfig, quantize
from .column_rounding import ROWS, round_group
from .devices import cholesky
from .error_passing import Passing
from .packed_matrix import PackedMatrix, packed
from .processors import cores
from .strips import RoundWave, round_in_strips

# Grids that each group tries: factors of the least-squares scale, and shifts of the bias in scales. That one is in it.
_FACTORS, _SHIFTS = (0.82, 0.86, 0.9, 0.94, 0.97, 1.0, 1.03, 1.07), (-0.25, 0, 0.25, 0.5)
GRIDS = tuple((factor, shift) for factor in _FACTORS for shift in _SHIFTS)
_OUTPUT_DAMPING = 0.3  # of the mean second moment of a block's gradients, added to each
_WITHIN = 1.02  # times the processor's loss: a GPU's may be, where other grids and codes are as good
_OfGroup = tuple[NDArray[Any], NDArray[Any]]
_one_at_a_time = Lock()
_log = logging.getLogger(__name__)


def row_feedback(gradients: Tensor, device: torch.device) -> Tensor:
    """Return by how much the error of a row counts for each later one of its block, ``[blocks, 64, 64]``, in float64.

    gradients: as for ``gptq``. device: computes it, or the CPU if it has no float64. With F = U Uᵀ, U upper
    triangular, and E the outputs' errors, the loss grows by |Uᵀ E|²: row i of it is Uᵢᵢ times Eᵢ plus the sum of
    Uⱼᵢ / Uᵢᵢ times Eⱼ over the rows j before. Zeros for a block that no gradient reaches, or whose gradients are not
    finite or have no factor.
    """
    sums = _double(gradients.to(device))
    mean = sums.diagonal(dim1=1, dim2=2).mean(1)[:, None, None]
    usable = torch.isfinite(sums).all(2, keepdim=True).all(1, keepdim=True) & (mean > 0)
    eye = torch.eye(sums.shape[1], dtype=sums.dtype, device=sums.device)
    relative = torch.where(usable, sums / mean, eye) + _OUTPUT_DAMPING * eye
    lower, definite = cholesky(relative.flip(1, 2))
    upper = lower.flip(1, 2)
    ratios = (upper / upper.diagonal(dim1=1, dim2=2)[:, None]).triu(1)
    return torch.where(definite[:, None, None], ratios, torch.zeros_like(ratios))


def round_columns(
    goal: Tensor,
    factor: Tensor,
    quantization: QuantizationConfig,
    storage: np.dtype[np.generic],
    feedback: Tensor | None = None,
) -> PackedMatrix:
    """Round column by column.

    goal: ``[rows, columns]``, may be overwritten. feedback: see ``row_feedback``, in the dtype of the goal; None where
    rows do not make up for each other. Each group's scales and biases are, or are near, the least-squares ones of its
    weights as they are when its first column is rounded: the values that make ``(goal - rounded) @ factor`` zero in the
    columns of the group. Of ``GRIDS`` around those, each row takes the one that leaves least of it. On a GPU where
    PyTorch comes with Triton, a kernel rounds there, and the result is there.
    """
    on_gpu = _gpu_rounder() if goal.device.type == "cuda" and goal.dtype == torch.float32 else None
    if on_gpu:
        return _on_gpu(on_gpu, goal, factor, quantization, storage, feedback)
    return _on_processor(goal, factor, quantization, storage, feedback)


def _on_processor(
    goal: Tensor,
    factor: Tensor,
    quantization: QuantizationConfig,
    storage: np.dtype[np.generic],
    feedback: Tensor | None,
) -> PackedMatrix:
    """Round column by column with all threads of the processor, as ``round_columns``."""
    rows, size, top = len(goal), quantization.group_size, (1 << quantization.bits) - 1
    codes = np.empty(goal.shape, np.uint8)
    grids = np.empty((2, rows, goal.shape[1] // size), np.float32)
    lost = goal  # of the columns that are rounded: goal - rounded
    local = goal.cpu().numpy()
    trials = np.array(GRIDS, np.float32)
    counts = None if feedback is None else feedback.cpu().numpy()
    blocks = -(-rows // ROWS)
    each = -(-blocks // cores())  # as many at once as there are processors: threads wait for each other between calls
    parts = [slice(first, first + each) for first in range(0, blocks, each)]
    with ThreadPoolExecutor(cores(), thread_name_prefix="ppx-round") as pool:
        passing = Passing(factor, size)
        for group, changed in enumerate(passing.groups(lost)):
            moved, triangle = changed.cpu().numpy(), np.ascontiguousarray(passing.inverses[group].cpu().numpy())
            columns = slice(group * size, (group + 1) * size)

            def rounded(part: slice, group: int = group, of: _OfGroup = (moved, triangle)) -> None:
                moved, triangle = of
                rows = slice(part.start * ROWS, part.stop * ROWS)
                values = moved[rows]
                scale, bias = grid(values, quantization, storage)
                round_group(
                    values,
                    local[rows],
                    group * size,
                    triangle,
                    trials,
                    STORAGE[storage],
                    top,
                    None if counts is None else counts[part],
                    scale,
                    bias,
                    codes[rows],
                )
                grids[0, rows, group], grids[1, rows, group] = scale, bias

            list(pool.map(rounded, parts))
            if lost.device.type != "cpu":
                lost[:, columns] = torch.from_numpy(local[:, columns]).to(lost.device)
    scales, biases = torch.from_numpy(grids)
    return PackedMatrix(packed(torch.from_numpy(codes), quantization.bits), scales, biases)


def _on_gpu(
    round_wave: RoundWave,
    goal: Tensor,
    factor: Tensor,
    quantization: QuantizationConfig,
    storage: np.dtype[np.generic],
    feedback: Tensor | None,
) -> PackedMatrix:
    """Round column by column on a GPU, as ``round_columns``."""
    return round_in_strips(round_wave, goal, factor, quantization, storage, _trials_on(goal.device), feedback)


@cache
def _trials_on(device: torch.device) -> Tensor:
    """Return ``GRIDS`` on a device, which is waited for once."""
    return torch.tensor(GRIDS, dtype=torch.float32, device=device)


@contextmanager
def compiling(device: str) -> Iterator[None]:
    """Compile and check what rounds on a CUDA GPU, in a thread; ``round_columns`` waits for it, and so does the end."""
    if device != "cuda":
        yield
        return
    index = torch.cuda.current_device()  # of this thread; another has the first GPU
    thread = Thread(target=_compile_on, args=(index,), name="ppx-compile")
    thread.start()
    try:
        yield
    finally:
        thread.join()


def _compile_on(index: int) -> None:
    torch.cuda.set_device(index)
    _gpu_rounder()


def _gpu_rounder() -> RoundWave | None:
    with _one_at_a_time:
        return _compiled_and_checked()


@cache
def _compiled_and_checked() -> RoundWave | None:
    """Return what rounds on the GPU; None where PyTorch comes without Triton, or ``_works`` says that it does not."""
    try:
        from .gpu_rounding import round_wave
    except ImportError:
        return None
    return round_wave if _works(round_wave, "cuda") else None


def _works(round_wave: RoundWave, device: str) -> bool:
    """Round a small matrix there, and tell whether that comes to what it does on the processor; warn if not."""
    random = torch.Generator().manual_seed(1)
    columns = 12 * 64  # more groups than errors reach at once
    goal = torch.randn(ROWS + 8, columns, generator=random)
    factor = torch.eye(columns) + torch.randn(columns, columns, generator=random).triu(1) / columns**0.5
    feedback = torch.randn(2, ROWS, ROWS, generator=random).triu(1) / ROWS
    quantization, storage = QuantizationConfig(4, 64, "gptq"), np.dtype(np.float16)

    def loss(rounded: PackedMatrix) -> float:
        return float(((goal - rounded.dequantized(quantization, "cpu")) @ factor).square().sum())

    expected = loss(_on_processor(goal.clone(), factor, quantization, storage, feedback))
    there = goal.to(device, copy=True)
    try:
        found = loss(_on_gpu(round_wave, there, factor.to(device), quantization, storage, feedback))
    except Exception as error:  # errors of Triton and of its compilers share no class
        reason = str(error).partition("\n")[0]
    else:
        if found < _WITHIN * expected:
            return True
        reason = f"its loss is {found:.4g}, where the processor's is {expected:.4g}"
    _log.warning("rounding on the processor: the kernel for GPUs does not work here (%s)", reason)
    return False


def grid(
    group: NDArray[Any], quantization: QuantizationConfig, storage: np.dtype[np.generic]
) -> tuple[NDArray[Any], NDArray[Any]]:
    """Return scale and bias of each row of a group ``[rows, group_size]``, as they are stored, in the group's dtype.

    They are those of least squares.
    """
    plain = QuantizationConfig(quantization.bits, quantization.group_size, "lsq")
    made = quantize(np.ascontiguousarray(group, np.float32), plain, storage)
    scale, bias = (sides.astype(np.float32).astype(group.dtype).reshape(-1) for sides in (made.scales, made.biases))
    return scale, bias


def _double(values: Tensor) -> Tensor:
    return (values.cpu() if values.device.type == "mps" else values).double()  # which has no float64
