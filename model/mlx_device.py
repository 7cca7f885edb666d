"""Where MLX computes: a device for a block of code, its streams, its name."""

import platform
import threading
from collections.abc import Iterator
from contextlib import contextmanager

import mlx.core as mx

from ..convert.errors import UserError
from ..convert.hints import Hint
from ..convert.parallel import cores

ARITHMETICS = ("float32", "bundle")
DEVICES = ("cpu", "gpu")
_made = threading.local()  # MLX's streams belong to the thread that made them


def device_of(asked: str | None) -> mx.Device:
    """Return the device that is asked for (``cpu``, ``gpu``), MLX's own choice for None.

    Raises UserError if it is not there.
    """
    if asked == "gpu" and not mx.is_available(mx.gpu):
        raise UserError("MLX has no GPU here", Hint.NO_GPU)
    if asked is None:
        return mx.default_device()
    return mx.Device(mx.gpu if asked == "gpu" else mx.cpu)


@contextmanager
def computing_on(asked: str | None) -> Iterator[mx.Device]:
    """Make a device MLX's default within a block; afterwards the default is what it was.

    Raises UserError if the device is not there.
    """
    device = device_of(asked)
    with mx.stream(device):
        yield device


def on_gpu() -> bool:
    """Tell whether MLX computes on a GPU at present."""
    return bool(mx.default_device() != mx.cpu)


def streams() -> tuple[mx.Stream, ...]:
    """Return the streams of the present device: one for each processor that this process may use, or a GPU's default.

    They are made once for each thread. MLX uses one processor for each of a CPU's streams.
    """
    if on_gpu():
        return (mx.default_stream(mx.default_device()),)
    if not hasattr(_made, "streams"):
        _made.streams = tuple(mx.new_stream(mx.cpu) for _ in range(cores()))
    held: tuple[mx.Stream, ...] = _made.streams
    return held


def device_name() -> str:
    """Return what the present device is, such as ``gpu NVIDIA H100 80GB HBM3``."""
    device = mx.default_device()
    kind = "gpu" if on_gpu() else "cpu"
    try:
        name = mx.device_info(device).get("device_name")
    except (AttributeError, TypeError):  # of MLX before 0.30
        name = mx.metal.device_info().get("device_name") if on_gpu() and mx.metal.is_available() else None
    return f"{kind} {name or platform.machine()}"
