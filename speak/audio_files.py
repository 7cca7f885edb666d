"""Audio files, read and written a frame at a time, through the optional ``soundfile`` and ``soxr``."""

import base64
import io
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from ..convert.errors import UserError, reason
from ..convert.regular_files import check_regular
from ..convert.source.mimi import FRAME, RATE
from ..model.forward import Floats
from .codec import MISSING

LONGEST = 3600  # seconds of a recording that is read into memory
_LARGEST = 1 << 32  # bytes of a file
_BLOCK = 1 << 15  # samples read at a time


def _packages() -> tuple[Any, Any]:
    try:
        import soundfile
        import soxr
    except ImportError:
        raise UserError(f"audio {MISSING}") from None
    return soundfile, soxr


def read(path: Path) -> Floats:
    """Return a file's first two channels at Mimi's rate, ``[channels, samples]``.

    Raises UserError for unreadable files, and for recordings longer than an hour.
    """
    soundfile, soxr = _packages()
    check_regular(path, _LARGEST)
    try:
        if soundfile.info(path).duration > LONGEST:
            raise UserError(f"{path}: longer than an hour: cut it")
        samples, rate = soundfile.read(path, dtype="float32", always_2d=True)
    except (OSError, RuntimeError, TypeError) as error:
        raise UserError(f"{path}: unreadable audio ({reason(error)})") from None
    if not np.isfinite(samples).all():
        raise UserError(f"{path}: contains NaN or infinite samples: the file is damaged")
    return np.ascontiguousarray(soxr.resample(samples[:, :2], rate, RATE).T)


@contextmanager
def reading(path: Path) -> Iterator[tuple[int, Iterator[Floats]]]:
    """Open a file; yield its length in samples at Mimi's rate, and its frames ``[FRAME]``, downmixed to mono.

    The last frame is padded with silence. Raises UserError for unreadable or empty files.
    """
    soundfile, soxr = _packages()
    check_regular(path, _LARGEST)
    try:
        file = soundfile.SoundFile(path)
    except (OSError, RuntimeError, TypeError) as error:
        raise UserError(f"{path}: unreadable audio ({reason(error)})") from None
    with file:
        count = round(file.frames * RATE / file.samplerate)
        if not count:
            raise UserError(f"{path}: the recording is empty")
        yield count, _frames(path, file, soxr, count)


def _frames(path: Path, file: Any, soxr: Any, count: int) -> Iterator[Floats]:
    resampler = soxr.ResampleStream(file.samplerate, RATE, 1, dtype="float32")
    rest, given = np.empty(0, np.float32), 0
    wanted = -(-count // FRAME)
    last = False
    while not last:
        try:
            block = file.read(_BLOCK, dtype="float32", always_2d=True).mean(1)
        except (OSError, RuntimeError) as error:
            raise UserError(f"{path}: truncated ({reason(error)})") from None
        if not np.isfinite(block).all():
            raise UserError(f"{path}: contains NaN or infinite samples: the file is damaged")
        last = len(block) < _BLOCK
        rest = np.concatenate([rest, resampler.resample_chunk(np.ascontiguousarray(block), last)])
        if last:  # the resampler may round the length differently
            rest = np.pad(rest, (0, FRAME))
        while len(rest) >= FRAME and given < wanted:
            yield rest[:FRAME]
            rest, given = rest[FRAME:], given + 1
    if given < wanted:
        raise UserError(f"{path}: truncated after {given * FRAME / RATE:.1f} s: it is damaged")


def data_uri(samples: Floats) -> str:
    """Return samples ``[samples]`` at Mimi's rate as a data URI that browsers play: FLAC, 16 bit, mono."""
    soundfile, _ = _packages()
    file = io.BytesIO()
    soundfile.write(file, np.clip(samples, -1, 1), RATE, format="FLAC", subtype="PCM_16")
    return "data:audio/flac;base64," + base64.b64encode(file.getvalue()).decode()


@contextmanager
def writing(path: Path, count: int | None) -> Iterator[Callable[[Floats], None]]:
    """Open a new WAV file, 16 bit mono; yield a function that appends a frame. The file is renamed into place last.

    count: samples to write at most, None for all.
    """
    soundfile, _ = _packages()
    partial = path.with_name(f".{path.name}.partial")
    left = [count]
    try:
        with soundfile.SoundFile(partial, "w", RATE, 1, "PCM_16", format="WAV") as file:

            def write(samples: Floats) -> None:
                kept = samples if left[0] is None else samples[: left[0]]
                left[0] = None if left[0] is None else left[0] - len(kept)
                file.write(np.clip(kept, -1, 1))

            yield write
        partial.rename(path)
    except soundfile.LibsndfileError as error:
        raise UserError(f"{path}: writing failed ({reason(error)})") from None
    finally:
        partial.unlink(missing_ok=True)
