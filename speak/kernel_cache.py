"""A model in memory whose kernels were tested on this device; the results are kept in the user's cache."""

import hashlib
import json
import math
import os
import re
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import suppress
from dataclasses import astuple, fields, is_dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

from ..convert import typed_json
from ..convert.cache_folder import cache_folder
from ..convert.errors import CheckFailed
from ..convert.progress import long_step
from ..model import kernel_test
from ..model.kernel_test import KernelRow
from ..model.matmul import QuantizedMatmul, Shape, shape_of
from ..model.mlx_device import device_name, on_gpu
from .language_model import Runtime
from .layers import Linear

_FORMAT = 1  # of the file, and of what is tested
_LARGEST = 1 << 22  # bytes
_LONG = 1 << 26  # weights from which on a test takes long enough to be announced
Tested = dict[Shape, list[KernelRow]]


def on_tested_kernels(runtime: Runtime, silent: bool = False, matmul: QuantizedMatmul | None = None) -> Runtime:
    """Return a model that multiplies rightly: kernels that MLX computes wrongly on this device are worked around.

    Kernels that are not in the cache are tested now, which is announced unless silent. matmul: what multiplies, MLX's
    own for None. Raises CheckFailed, which blames MLX, where nothing works around a kernel.
    """
    parts = [part for linear in linears(runtime) for part, _ in linear.parts if part.packing]
    shapes = sorted({shape_of(part, runtime.dtype) for part in parts})
    file = cache_folder() / _file_name()
    known = {shape: rows for shape, rows in read(file).items() if shape in shapes}
    missing = [shape for shape in shapes if shape not in known]
    if missing:
        long = on_gpu() or sum(shape.rows * shape.columns for shape in missing) >= _LONG
        label = "MLX compiles its kernels, and they are tested" if on_gpu() else "testing MLX's kernels"
        with long_step(label, len(missing), "shape", silent or not long) as progress:
            rows, _ = kernel_test.check(missing, matmul, progress.update)
        if wrong := kernel_test.failures(rows):
            raise CheckFailed(kernel_test.complaint(wrong[0]))
        for row in rows:
            known.setdefault(row.shape, []).append(row)
        with suppress(OSError):  # a cache that cannot be written costs time, and nothing else
            write(file, read(file) | known)
    replaced = kernel_test.replaced_in(row for rows in known.values() for row in rows)
    sound: Runtime = with_matmul(runtime, replace(matmul or kernel_test.default_matmul(), replaced=replaced))
    return sound


def linears(value: Any) -> Iterator[Linear]:
    """Yield every matrix of a model, or of a part of it."""
    if isinstance(value, Linear):
        yield value
    elif isinstance(value, tuple):
        for part in value:
            yield from linears(part)
    elif is_dataclass(value):
        for field in fields(value):
            yield from linears(getattr(value, field.name))


def with_matmul(value: Any, matmul: QuantizedMatmul) -> Any:
    """Return a model, or a part of it, whose matrices multiply in a given way."""
    if isinstance(value, Linear):
        return replace(value, matmul=matmul)
    if isinstance(value, tuple):
        return tuple(with_matmul(part, matmul) for part in value)
    if is_dataclass(value) and not isinstance(value, type) and any(linears(value)):
        held = {field.name: getattr(value, field.name) for field in fields(value)}
        return replace(value, **{name: with_matmul(part, matmul) for name, part in held.items()})
    return value


def _file_name() -> str:
    device = re.sub(r"[^\w.]+", "-", device_name())
    return f"kernels-{_FORMAT}-mlx-{version('mlx')}-{device}.json"


def _identity() -> dict[str, object]:
    return {"format": _FORMAT, "mlx": version("mlx"), "device": device_name()}


def read(file: Path) -> Tested:
    """Return what was tested earlier on this device with this version of MLX; nothing if the file is not ours."""
    try:
        if file.stat().st_size > _LARGEST:
            return {}
        data = json.loads(file.read_text("utf-8"))
        rows = data["rows"]
        if data != _identity() | {"rows": rows, "sha256": _digest(rows)}:
            return {}
        tested: Tested = {}
        for row in map(KernelRow.from_json, rows):
            judged = kernel_test.judged(row.shape, row.positions, row.relative_l2, row.instead)
            tested.setdefault(row.shape, []).append(judged)
    except (OSError, ValueError, LookupError, TypeError, RecursionError):
        return {}
    whole = [
        shape
        for shape, rows in tested.items()
        if tuple(row.positions for row in rows) == kernel_test.default_matmul().tried
    ]
    return {shape: tested[shape] for shape in whole if not kernel_test.failures(tested[shape])}


def write(file: Path, tested: Tested) -> None:
    """Write tests, under a temporary name first."""
    rows = _as_json(row for shape in sorted(tested, key=astuple) for row in tested[shape])
    file.parent.mkdir(parents=True, exist_ok=True)
    number, partial = tempfile.mkstemp(prefix=f".{file.name}-", dir=file.parent)
    try:
        with os.fdopen(number, "w", encoding="utf-8") as out:
            json.dump(_identity() | {"rows": rows, "sha256": _digest(rows)}, out)
        Path(partial).replace(file)
    except BaseException:
        Path(partial).unlink(missing_ok=True)
        raise


def _as_json(rows: Iterable[KernelRow]) -> list[object]:
    """Return rows as JSON holds them: an infinite error as null."""
    finite = lambda value: None if isinstance(value, float) and not math.isfinite(value) else value  # noqa: E731
    return [typed_json.to_json(typed_json.mapped(row, finite)) for row in rows]


def _digest(rows: object) -> str:
    return hashlib.sha256(json.dumps(rows, sort_keys=True).encode()).hexdigest()
