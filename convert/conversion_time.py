"""How long a conversion takes on this machine, from a moment of measurement: quantizing, hashing, and the disk."""

import hashlib
import time
from collections import Counter
from collections.abc import Callable

import numpy as np

from ..quant.affine import DATA_DRIVEN, WEIGHTED, QuantizationConfig, quantize
from .bundle.plan import Plan
from .bundle.recipe import DTYPES
from .tensorfile import DTYPES as ARRAY_DTYPES

_ROWS, _COLUMNS = 128, 4096  # of the matrix that is quantized for it: 128 is the largest group
_HASHED = 1 << 24  # bytes
_DISK = 1e9  # bytes a second: assumed
_TIMES = 2  # the shorter of which counts


def conversion_seconds(plan: Plan, workers: int) -> float:
    """Return about how many seconds a conversion takes with so many threads, without what is quantized by data.

    The source is read twice and hashed once; the bundle is written, hashed, read back and hashed again.
    """
    weights: Counter[QuantizationConfig] = Counter()
    for output in plan.outputs:
        if output.quantization and output.quantization.method not in DATA_DRIVEN:
            weights[output.quantization] += output.shape[0] * output.shape[-1]
    storage = ARRAY_DTYPES[DTYPES[plan.recipe.dtype]]
    work = sum(count * _for_a_weight(quantization, storage) for quantization, count in weights.items()) / workers
    source = sum(plan.inventory.sizes.values())
    return work + (2 * source + 2 * plan.nbytes) / _DISK + (source + 2 * plan.nbytes) * _for_a_byte()


def _for_a_weight(quantization: QuantizationConfig, storage: "np.dtype[np.generic]") -> float:
    """Return the seconds in which one thread quantizes a weight."""
    values = np.random.default_rng(0).standard_normal((_ROWS, _COLUMNS), np.float32).astype(ARRAY_DTYPES["BF16"])
    importance = np.ones(_COLUMNS) if quantization.method in WEIGHTED else None
    return _shortest(lambda: quantize(values, quantization, storage, importance)) / values.size


def _for_a_byte() -> float:
    """Return the seconds in which a byte is hashed."""
    return _shortest(lambda: hashlib.sha256(bytes(_HASHED))) / _HASHED


def _shortest(function: Callable[[], object]) -> float:
    """Return the seconds that a call takes; the first one, which may compile, does not count."""
    took = []
    for _ in range(1 + _TIMES):
        began = time.perf_counter()
        function()
        took.append(time.perf_counter() - began)
    return min(took[1:])
