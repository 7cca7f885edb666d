"""Microphone and speaker, through the optional ``sounddevice``."""

import threading
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np

from ..convert.errors import UserError, reason
from ..convert.source.mimi import FRAME, RATE
from ..model.forward import Floats

_QUEUE = 3  # frames in each queue, at most
_MISSING = "live audio needs more packages: pip install 'ppx-convert[audio,live]'"


@contextmanager
def devices() -> Iterator[tuple[Iterator[Floats], Callable[[Floats], None]]]:
    """Open the default devices; yield an endless iterator of input frames ``[FRAME]`` and a function that plays frames.

    If the model is too slow, the oldest frames are dropped, so that the delay does not grow. Raises UserError if there
    is no device.
    """
    sounddevice = _package()
    recorded: deque[Floats] = deque(maxlen=_QUEUE)
    played: deque[Floats] = deque(maxlen=_QUEUE)
    arrived = threading.Semaphore(0)

    def exchange(taken: Any, given: Any, count: int, when: Any, status: Any) -> None:
        del count, when, status
        recorded.append(np.array(taken[:, 0], np.float32))
        arrived.release()
        given[:, 0] = played.popleft() if played else 0

    def frames() -> Iterator[Floats]:
        while True:
            arrived.acquire()
            if recorded:  # empty if the frame was dropped
                yield recorded.popleft()

    try:
        stream = sounddevice.Stream(samplerate=RATE, blocksize=FRAME, channels=1, dtype="float32", callback=exchange)
        stream.start()
    except (sounddevice.PortAudioError, ValueError) as error:
        raise UserError(f"microphone or speaker do not open ({reason(error)})") from None
    try:
        yield frames(), played.append
    finally:
        stream.close()


def check() -> None:
    """Raise UserError if there is no microphone or no speaker."""
    sounddevice = _package()
    try:
        sounddevice.check_input_settings(channels=1, samplerate=RATE)
        sounddevice.check_output_settings(channels=1, samplerate=RATE)
    except (sounddevice.PortAudioError, ValueError) as error:
        raise UserError(f"no microphone or no speaker here ({reason(error)})") from None


def _package() -> Any:
    try:
        import sounddevice
    except ImportError:
        raise UserError(_MISSING) from None
    except OSError as error:
        raise UserError(f"no sound library here ({reason(error)})", "install PortAudio") from None
    return sounddevice
