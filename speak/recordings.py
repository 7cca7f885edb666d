"""Recorded audio as tokens: encoded with the source's own Mimi, through the optional ``rustymimi``."""

from pathlib import Path

import numpy as np

from ..convert.errors import UserError, printable
from ..convert.file_names import CODEC
from ..convert.source.mimi import FRAME
from ..convert.source.source import Source
from ..model.forward import Tokens
from ..model.session import SILENCE
from ..model.tokens import TokenSet, from_tokens
from . import audio_files
from .codec import Codec


def read_audio(path: Path, source: Source, frames: int | None) -> TokenSet:
    """Read a recording as a token set; see ``recorded``."""
    return from_tokens(recorded(path, source, frames), source.architecture, "audio", printable(path.name))


def recorded(path: Path, source: Source, frames: int | None = None) -> Tokens:
    """Return tokens ``[1, streams, frames]`` of an audio file of any sample rate, without delays.

    Channel 1 is the agent, channel 2 the user. A mono file is the user, and the agent is silent. The text stream is
    padding. Raises UserError for unreadable files, and if the optional packages are missing.
    """
    a = source.architecture
    half = a.n_q // 2
    samples = audio_files.read(path)
    length = samples.shape[1] // FRAME
    length = min(length, frames or length)
    if not length:
        raise UserError(f"{path}: shorter than a frame of 80 ms: give a longer recording")
    codec = Codec(source.location.folder / CODEC, half)
    encoded = [codec.encode_whole(channel[: length * FRAME]) for channel in samples]
    if len(encoded) == 1:
        silence = np.array([token % a.card for token in SILENCE[:half]])[:, None]
        encoded.insert(0, np.broadcast_to(silence, encoded[0].shape))
    text = np.full((1, length), a.text_padding)
    tokens = np.concatenate([text, *encoded])[None].astype(np.int32)
    if tokens[:, 1:].max() >= a.card:
        raise UserError(
            f"{codec.path}: returns tokens outside the vocabulary of this model: it is the codec of another one"
        )
    return tokens
