"""Recorded audio as tokens: encoded with the source's own Mimi, through the optional ``rustymimi``."""

from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..convert.problems import UserError
from ..convert.source import CODEC, Source
from .material import Material, from_tokens
from .model import Tokens
from .session import SILENCE

RATE = 24000  # samples a second, as Mimi takes them
FRAME = 1920  # samples of a frame
_LONGEST = 3600  # seconds
_MISSING = "--audio needs more packages: pip install 'ppx-convert[audio]'"


def read_audio(path: Path, source: Source, frames: int | None) -> Material:
    """Read a recording as material; see ``recorded``."""
    tokens = recorded(path, source, frames)
    shape = {"sequences": 1, "frames": tokens.shape[2]}
    return from_tokens(tokens, source.architecture, {"kind": "audio", "file": path.name} | shape)


def recorded(path: Path, source: Source, frames: int | None = None) -> Tokens:
    """Return tokens ``[1, streams, frames]`` of a WAV of any rate, as heard.

    Its first channel is the agent, its second the user; of one channel, the user's alone, which is what a silent agent
    hears. The text stream is padding. Raises UserError for a file that cannot be read, and without the packages.
    """
    a = source.architecture
    half = a.n_q // 2
    samples = _samples(path)
    length = samples.shape[1] // FRAME
    length = min(length, frames or length)
    if not length:
        raise UserError(f"{path}: shorter than a frame of 80 ms: give a longer recording")
    codec = source.location.folder / CODEC
    encoded = [_encode(codec, channel[: length * FRAME], half) for channel in samples]
    if len(encoded) == 1:
        silence = np.array([token % a.card for token in SILENCE[:half]])[:, None]
        encoded.insert(0, np.broadcast_to(silence, encoded[0].shape))
    text = np.full((1, length), a.text_padding)
    tokens = np.concatenate([text, *encoded])[None].astype(np.int32)
    if tokens[:, 1:].max() >= a.card:
        raise UserError(f"{codec}: gives tokens that this model does not have: it belongs to another one")
    return tokens


def _samples(path: Path) -> NDArray[np.float32]:
    """Return a file's first two channels at Mimi's rate, ``[channels, samples]``."""
    try:
        import soundfile
        import soxr
    except ImportError:
        raise UserError(_MISSING) from None
    try:
        if soundfile.info(path).duration > _LONGEST:
            raise UserError(f"{path}: longer than an hour: cut it, or encode it and give --tokens")
        samples, rate = soundfile.read(path, dtype="float32", always_2d=True)
    except (OSError, RuntimeError, TypeError) as error:
        raise UserError(f"{path}: not audio that can be read ({str(error)[:80]})") from None
    resampled: NDArray[np.float32] = soxr.resample(samples[:, :2], rate, RATE).T
    return np.ascontiguousarray(resampled)


def _encode(codec: Path, samples: NDArray[np.float32], codebooks: int) -> NDArray[np.int64]:
    """Return Mimi's tokens ``[codebooks, frames]`` for one channel."""
    try:
        import rustymimi
    except ImportError:
        raise UserError(_MISSING) from None
    try:
        tokenizer: Any = rustymimi.Tokenizer(str(codec), num_codebooks=codebooks)
        codes = tokenizer.encode(samples[None, None])
    except (OSError, RuntimeError, ValueError) as error:
        raise UserError(f"{codec}: not a codec that rustymimi loads ({str(error).splitlines()[0][:80]})") from None
    return np.asarray(codes[0], np.int64)
