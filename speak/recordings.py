"""Recorded audio as tokens: encoded with the source's own Mimi, through the optional ``rustymimi``."""

from pathlib import Path

import numpy as np

from ..convert.errors import UserError, printable
from ..convert.source.architecture import Architecture
from ..convert.source.mimi import FRAME
from ..convert.source.source import Source
from ..model.forward import Tokens
from ..model.prompt import PROMPT, prompt_tokens
from ..model.session import SILENCE
from ..model.tokens import AUDIO, TokenSet, from_system_prompt, from_tokens
from . import audio_files
from .codec import Codec


def read_audio(path: Path, source: Source, frames: int | None) -> TokenSet:
    """Read a recording as a token set; raises UserError for unreadable files, and if optional packages are missing.

    A mono file is what a user says after the system prompt of a conversation, in the first voice if there are any: the
    model reads it as it does in use. Channels 1 and 2 of another are agent and user; nothing stands in front of them.
    frames: at most so many, the prompt included.
    """
    a, name = source.architecture, printable(path.name)
    channels = _encoded(path, source, frames)
    if len(channels) > 1:
        return from_tokens(_conversation(channels, a), a, AUDIO, name)
    text = prompt_tokens(source.location.tokenizer, a, PROMPT)
    voices = [voice.name for voice in source.voices][:1]
    return from_system_prompt(a, source.voices, voices, text, frames, PROMPT, channels[0], name)


def recorded(path: Path, source: Source, frames: int | None = None) -> Tokens:
    """Return tokens ``[1, streams, frames]`` of an audio file of any sample rate, without delays.

    Channel 1 is the agent, channel 2 the user. A mono file is the user, and the agent is silent. The text stream is
    padding. Raises UserError for unreadable files, and if the optional packages are missing.
    """
    channels = _encoded(path, source, frames)
    if len(channels) == 1:
        silence = np.array([token % source.architecture.card for token in SILENCE[: len(channels[0])]], np.int32)
        channels.insert(0, np.broadcast_to(silence[:, None], channels[0].shape))
    return _conversation(channels, source.architecture)


def _encoded(path: Path, source: Source, frames: int | None) -> list[Tokens]:
    """Return the tokens ``[codebooks, frames]`` of each channel."""
    a = source.architecture
    samples = audio_files.read(path)
    length = samples.shape[1] // FRAME
    length = min(length, frames or length)
    if not length:
        raise UserError(f"{path}: shorter than a frame of 80 ms: give a longer recording")
    codec = Codec(source.location.codec, a.n_q // 2)
    channels = [codec.encode_whole(channel[: length * FRAME]).astype(np.int32) for channel in samples]
    if max(channel.max() for channel in channels) >= a.card:
        raise UserError(
            f"{codec.path}: returns tokens outside the vocabulary of this model: it is the codec of another one"
        )
    return channels


def _conversation(channels: list[Tokens], architecture: Architecture) -> Tokens:
    """Return agent and user as ``[1, streams, frames]``, the text stream padding."""
    text = np.full((1, channels[0].shape[1]), architecture.text_padding, np.int32)
    return np.concatenate([text, *channels])[None]
