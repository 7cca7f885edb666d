"""Microphone and speaker, through the optional ``sounddevice``."""

import queue
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import repeat
from typing import Any

import numpy as np

from ..convert.mimi import FRAME, RATE
from ..convert.problems import UserError
from .model import Floats

_MISSING = "--live needs more packages: pip install 'ppx-convert[audio,live]'"


@contextmanager
def devices() -> Iterator[tuple[Iterator[Floats], Callable[[Floats], None]]]:
    """Open the default devices; give the frames ``[FRAME]`` that are heard, without end, and a way to play some.

    Where a model is too slow, sound is missing from what is played; nothing waits for it. Raises UserError where there
    is no device.
    """
    try:
        import sounddevice
    except ImportError:
        raise UserError(_MISSING) from None
    except OSError as error:
        raise UserError(f"--live: no sound library here ({str(error)[:80]}): install PortAudio") from None
    heard: queue.Queue[Floats] = queue.Queue()
    played: queue.Queue[Floats] = queue.Queue()

    def exchange(taken: Any, given: Any, count: int, when: Any, status: Any) -> None:
        del count, when, status
        heard.put(np.array(taken[:, 0], np.float32))
        try:
            given[:, 0] = played.get_nowait()
        except queue.Empty:
            given.fill(0)

    try:
        stream = sounddevice.Stream(samplerate=RATE, blocksize=FRAME, channels=1, dtype="float32", callback=exchange)
    except (sounddevice.PortAudioError, ValueError) as error:
        raise UserError(f"--live: no microphone or no speaker here ({str(error)[:80]})") from None
    with stream:
        yield (heard.get() for _ in repeat(None)), played.put
