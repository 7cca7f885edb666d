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

_BEHIND = 3  # frames that wait at most, on either side
_MISSING = "--live needs more packages: pip install 'ppx-convert[audio,live]'"


@contextmanager
def devices() -> Iterator[tuple[Iterator[Floats], Callable[[Floats], None]]]:
    """Open the default devices; give the frames ``[FRAME]`` that are heard, without end, and a way to play some.

    Where a model is too slow, the oldest frames are dropped, so that answers do not come later and later. Raises
    UserError where there is no device.
    """
    sounddevice = _package()
    heard: deque[Floats] = deque(maxlen=_BEHIND)
    played: deque[Floats] = deque(maxlen=_BEHIND)
    arrived = threading.Semaphore(0)

    def exchange(taken: Any, given: Any, count: int, when: Any, status: Any) -> None:
        del count, when, status
        heard.append(np.array(taken[:, 0], np.float32))
        arrived.release()
        given[:, 0] = played.popleft() if played else 0

    def frames() -> Iterator[Floats]:
        while True:
            arrived.acquire()
            if heard:  # not one that was dropped
                yield heard.popleft()

    try:
        stream = sounddevice.Stream(samplerate=RATE, blocksize=FRAME, channels=1, dtype="float32", callback=exchange)
        stream.start()
    except (sounddevice.PortAudioError, ValueError) as error:
        raise UserError(f"--live: microphone or speaker do not open ({reason(error)})") from None
    try:
        yield frames(), played.append
    finally:
        stream.close()


def check() -> None:
    """Raise UserError where there is no microphone or no speaker, before a model is loaded."""
    sounddevice = _package()
    try:
        sounddevice.check_input_settings(channels=1, samplerate=RATE)
        sounddevice.check_output_settings(channels=1, samplerate=RATE)
    except (sounddevice.PortAudioError, ValueError) as error:
        raise UserError(f"--live: no microphone or no speaker here ({reason(error)})") from None


def _package() -> Any:
    try:
        import sounddevice
    except ImportError:
        raise UserError(_MISSING) from None
    except OSError as error:
        raise UserError(f"--live: no sound library here ({reason(error)}): install PortAudio") from None
    return sounddevice
