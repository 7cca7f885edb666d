"""How fast this machine does what layer-wise GPTQ consists of: each part timed for a moment, at a plan's sizes."""

import time
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from ..convert.source.architecture import Architecture
from ..convert.source.tensors import roles
from ..model import torch_device as devices
from ..model.blocks import blocks_of
from ..model.reference import TorchModel
from ..quant.affine import QuantizationConfig, quantize
from ..quant.packed_matrix import packed_matrix
from ..quant.rounding import round_columns
from .work import Work

_WIDEST = 4096  # columns and rows of what is timed: above it, rates change little
_FACTORED = 3072  # columns of what is factored
_FRAMES = 1024
_SEQUENCE = 256  # of these frames
_BLOCK = 512  # width of a block whose element by element operations are timed
_GROUPS, _ALL_GROUPS = 8, 64
_THIN = 8  # rows: sessions that are generated side by side
_DISK = 2 / 1e9  # seconds for a weight in bfloat16: assumed, 1 GB/s
_TIMES = 2  # the shorter of which counts


@dataclass(frozen=True)
class Rates:
    """Seconds on this machine for one of what ``Work`` counts, under the same names."""

    products: float
    factors: float
    rounded: float
    read: float
    groups: float
    streamed: float
    stepped: float
    blocks: float
    thin: float
    unread: float

    def seconds(self, work: Work) -> float:
        """Return how long some work takes."""
        return float(sum(getattr(self, name) * getattr(work, name) for name in self.__dataclass_fields__))


@dataclass(frozen=True)
class _Timer:
    """Times what computes on a device, by a clock."""

    device: str
    clock: Callable[[], float]

    def seconds(self, function: Callable[[], object]) -> float:
        """Return the seconds that a call takes; the first one, which may compile or allocate, does not count."""
        took = []
        for _ in range(1 + _TIMES):
            start = self.clock()
            function()
            if self.device == "cuda":
                torch.cuda.synchronize()
            took.append(self.clock() - start)
        return min(took[1:])


def measure(a: Architecture, device: str | None = None, clock: Callable[[], float] = time.perf_counter) -> Rates:
    """Measure rates for an architecture's widths: a few seconds at full size."""
    timer = _Timer(device or devices.device(), clock)
    wide = min(_WIDEST, max(a.dim, a.hidden, 64 * _GROUPS) // 64 * 64)
    values = torch.randn(wide, wide, generator=torch.Generator().manual_seed(7))
    square = values.to(timer.device)
    frames = square[:_FRAMES]
    product = timer.seconds(lambda: frames @ square) / (2 * len(frames) * wide * wide)
    moments = square[:_FACTORED, :_FACTORED] / wide  # of which the lower triangle is read
    moments.diagonal().add_(1)
    low = min(64, wide // 2)
    few, many = (_rounding(timer, rows, _GROUPS) for rows in (low, wide))
    half = square.bfloat16()
    thin = half[:_THIN]
    return Rates(
        products=product,
        factors=timer.seconds(lambda: torch.linalg.cholesky_ex(moments)) / (len(moments) ** 3 / 3),
        rounded=max(0.0, many - few) / ((wide - low) * _GROUPS * 64),
        read=_reading(timer, values[:_FRAMES]),
        groups=_rounding(timer, low, _ALL_GROUPS) / _ALL_GROUPS,  # a GPU takes longer for the first and the last few
        streamed=_streaming(timer, min(_BLOCK, a.dim), _FRAMES, _SEQUENCE, product),
        stepped=_streaming(timer, min(_BLOCK, a.depformer_dim), _FRAMES, a.steps, product),
        blocks=_streaming(timer, 64, 16, 16, product, copied=True) * 2 * 4 * 16 * 64,
        thin=timer.seconds(lambda: thin @ half) / half.numel(),
        unread=_DISK,
    )


def _rounding(timer: _Timer, rows: int, groups: int) -> float:
    """Return the seconds of rounding so many rows and groups of columns."""
    columns = groups * 64
    goal = torch.randn(rows, columns, generator=torch.Generator().manual_seed(7))
    factor = torch.eye(columns, device=timer.device)
    quantization, storage = QuantizationConfig(4, 64), np.dtype(np.float16)
    return timer.seconds(lambda: round_columns(goal.clone().to(timer.device), factor, quantization, storage))


def _reading(timer: _Timer, values: Tensor) -> float:
    """Return the seconds of making a weight float32 on the device: the mean from bfloat16 and from codes."""
    quantization = QuantizationConfig(4, 64, "rtn")
    stored, narrow = packed_matrix(quantize(values.numpy(), quantization)), values.bfloat16()
    codes = timer.seconds(lambda: stored.dequantized(quantization, timer.device))
    return (codes + timer.seconds(lambda: narrow.to(timer.device, torch.float32))) / 2 / values.numel()


def _streaming(timer: _Timer, dim: int, frames: int, length: int, product: float, copied: bool = False) -> float:
    """Return the seconds of a block for each byte that goes into it or comes out, without those of its products.

    copied: whether that is copied to the device and back, as where tokens are generated.
    """
    heads = max(1, dim // 64)
    a = Architecture(dim, heads, 1, text_card=32, card=32, depformer_dim=32, depformer_num_heads=1)
    known = {name: torch.ones(role.shape, device=timer.device) / dim for name, role in roles(a).items()}
    model = TorchModel(
        a, lambda name, _: known[name], lambda name, _: known[name], torch.float32, a.context, 16, timer.device
    )
    array = np.ones((frames // length, length, dim), np.float32)
    x = torch.from_numpy(array).to(timer.device)

    def compute() -> None:
        for block in blocks_of(a, "temporal"):
            if copied:
                model.block(block, array)
            else:
                model.advance(block, x)

    weights = sum(known[name].numel() for name, role in roles(a).items() if role.component == "temporal")
    operations = 2 * frames * weights + 4 * frames * length * dim
    return max(0.0, timer.seconds(compute) - product * operations) / (2 * 2 * x.nbytes)
