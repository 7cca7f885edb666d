"""Voices from recordings: for a checkpoint, to be kept or converted with it, and for a conversation with a bundle."""

import hashlib
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..convert.bundle.reader import Bundle
from ..convert.errors import Problem, UserError
from ..convert.hints import Hint
from ..convert.regular_files import read_regular
from ..convert.source.architecture import Architecture
from ..convert.source.mimi import FRAME, RATE
from ..convert.source.recorded_voice import (
    MOST_FRAMES,
    SUFFIX,
    RecordedVoice,
    VoiceOrigin,
    as_tokens,
    check_consent,
    check_voice_name,
    read_voice_file,
    tables_sha256,
    write_voice,
)
from ..convert.source.source import Source
from ..convert.source.voices import Voice
from ..model.forward import Floats
from ..model.voice_prompt import EmbeddingRows, make_voice, rows_of
from . import audio_files
from .codec import MISSING, Codec

__all__ = ["check_voice_path", "is_path", "read_voice", "record_voice", "voice_for_bundle", "voices_for", "write_voice"]

LOUDNESS = -24.0  # LUFS, that of the reference's voice prompts
_LARGEST = 1 << 28  # bytes of a recording
# How far the sums of a bundle's tables may be from those in a voice's file, relative to these: quantized tables of 3
# bit differ by a fifth, tables of another model by more than the whole.
_SAME_TABLES = 0.7


def record_voice(source: Source, recording: str | Path, consent: str, name: str | None = None) -> RecordedVoice:
    """Return a voice for a checkpoint from a recording of a person who agreed to it.

    Example::

        with open_named("demo:audio") as source:
            mine = record_voice(source, "mine.wav", "I am the speaker, and agree to this use of my voice.")

    recording: an audio file of 0.4 to 60 seconds, of any sample rate; its channels are mixed. consent: who agreed to
    what, in words. name: the recording's if it is not given. Raises UserError for a missing consent, a name that is
    taken, a recording or codec that cannot be used, and if the optional packages are missing.
    """
    path, words = Path(recording), check_consent(consent)
    name = check_voice_name(path.stem if name is None else name, [voice.name for voice in source.voices])
    digest = _sha256(path)
    codes = _encoded(path, source.location.codec, source.architecture)
    voice = make_voice(name, codes, source.architecture, rows_of(source.checkpoint))
    origin = VoiceOrigin(name, words, digest, tables_sha256(source.checkpoint), as_tokens(codes))
    return RecordedVoice(voice, origin)


def read_voice(source: Source, path: str | Path) -> RecordedVoice:
    """Return the voice in a file of ``write_voice``; its values are computed again and compared.

    Raises UserError for what is not such a file, and for a voice that was made from other embedding tables.
    """
    path = Path(path)
    recorded = read_voice_file(path, source.architecture)
    if recorded.origin.embedding_tables != tables_sha256(source.checkpoint):
        raise UserError(
            Problem(
                str(path), f"made from other embedding tables than those of {source.location.identity}", Hint.MAKE_VOICE
            )
        )
    voice = recorded.voice
    again = make_voice(voice.name, recorded.origin.codes, source.architecture, rows_of(source.checkpoint))
    for what, stored, expected in (
        ("embeddings", voice.embeddings, again.embeddings),
        ("cache", voice.cache, again.cache),
    ):
        if stored.shape != expected.shape or stored.tobytes() != expected.tobytes():
            raise UserError(Problem(str(path), f"its {what} are not those of its tokens: damaged", Hint.MAKE_VOICE))
    return recorded


def voices_for(paths: Sequence[str | Path], consent: str | None = None) -> Callable[[Source], list[RecordedVoice]]:
    """Return what ``ppx.convert.convert`` takes as its voices: recordings, and files of ``ppx-voice``.

    Example::

        convert("demo:audio", "my-bundle", voices=voices_for(["mine.wav"], "I am the speaker, and agree to this."))

    consent: for the recordings; a file of ``ppx-voice`` has its own. Raises UserError for what can be seen without the
    source: a file that is not there, a missing consent, a recording whose name is no voice's.
    """
    files = [Path(path) for path in paths]
    for path in files:
        check_voice_path(path, consent)
        if path.suffix != SUFFIX:
            check_voice_name(path.stem)

    def voices(source: Source) -> list[RecordedVoice]:
        recorded = []
        for path in files:
            is_file = path.suffix == SUFFIX
            recorded.append(read_voice(source, path) if is_file else record_voice(source, path, consent or ""))
            source = source.with_voices(recorded[-1:])  # a name is taken once
        return recorded

    return voices


def check_voice_path(path: Path, consent: str | None) -> None:
    """Raise UserError for a file of a voice that is not there, and for a recording without consent."""
    if not path.is_file():
        raise UserError(f"{path}: no such file: give a recording, or a file of ppx-voice")
    if path.suffix != SUFFIX:
        check_consent(consent)


def is_path(voice: str) -> bool:
    """Tell whether a voice is named by its file: names of voices have no dot and no slash."""
    return "." in voice or "/" in voice


def voice_for_bundle(bundle: Bundle, path: Path, consent: str | None, codec: Codec) -> Voice:
    """Return the voice of a recording, or in a file of ``ppx-voice``, over a bundle's own embedding tables.

    Raises UserError for what ``record_voice`` and ``read_voice`` refuse; a voice in a file was made from other tables
    if what these give is far from what it holds.
    """
    check_voice_path(path, consent)
    a, rows = bundle.architecture, bundle_rows(bundle)
    if path.suffix != SUFFIX:
        codes = _tokens(path, codec, a)
        codec.reset()  # the conversation begins without what the voice left in it
        return make_voice(path.stem, codes, a, rows)
    stored = read_voice_file(path, a)
    voice = make_voice(stored.voice.name, stored.origin.codes, a, rows)
    expected = stored.voice.embeddings.astype(np.float32)
    distance = np.linalg.norm(voice.embeddings.astype(np.float32) - expected)
    if not distance <= _SAME_TABLES * np.linalg.norm(expected) or not np.array_equal(voice.cache, stored.voice.cache):
        raise UserError(Problem(str(path), f"made from other embedding tables than {bundle.folder}", Hint.MAKE_VOICE))
    return voice


def bundle_rows(bundle: Bundle) -> EmbeddingRows:
    """Return what reads rows of a bundle's embedding tables, dequantized where they are quantized."""
    from ..model.mlx_weights import joined, read_matrix

    def rows(name: str, numbers: NDArray[np.int64]) -> NDArray[Any]:
        output = bundle.output(name)
        parts = [read_matrix(bundle, output, number, number + 1) for number in numbers.tolist()]
        return np.array(joined(parts).float32())

    return rows


def normalized(samples: Floats, path: Path) -> Floats:
    """Return mono samples at Mimi's rate at LOUDNESS; raises UserError where they are too short or quiet to measure.

    Integrated loudness after ITU-R BS.1770-4, by pyloudnorm, as in the reference; peaks are not limited, as there.
    """
    try:
        import pyloudnorm
    except ImportError:
        raise UserError(f"audio {MISSING}") from None
    try:
        loudness = pyloudnorm.Meter(RATE).integrated_loudness(samples)
    except ValueError:
        length = f"it is {len(samples) / RATE:.2f} s long, and 0.4 s are needed"
        raise UserError(f"{path}: its loudness cannot be measured ({length}): give a longer recording") from None
    if not np.isfinite(loudness):
        raise UserError(f"{path}: too quiet to be a voice: give a recording in which somebody speaks")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of peaks above full scale, which the reference leaves to Mimi as well
        louder = pyloudnorm.normalize.loudness(samples, loudness, LOUDNESS)
    return np.asarray(louder, np.float32)


def _sha256(path: Path) -> str:
    return hashlib.sha256(read_regular(path, _LARGEST)).hexdigest()


def _encoded(path: Path, codec: Path, architecture: Architecture) -> NDArray[np.int16]:
    return _tokens(path, Codec(codec, architecture.n_q // 2), architecture)


def _tokens(path: Path, codec: Codec, architecture: Architecture) -> NDArray[np.int16]:
    """Return a recording's tokens ``[codebooks, frames]``: frame by frame, the last one filled up with zeros."""
    samples = audio_files.read(path).mean(0, dtype=np.float32)
    count = -(-len(samples) // FRAME)
    if count > MOST_FRAMES:
        most = MOST_FRAMES * FRAME // RATE
        raise UserError(f"{path}: {len(samples) / RATE:.0f} s long: at most {most} s are read, a few are usual: cut it")
    samples = np.pad(normalized(samples, path), (0, count * FRAME - len(samples)))
    codec.reset()
    codes = np.stack([codec.encode(frame) for frame in samples.reshape(count, FRAME)], 1)
    if codes.max() >= architecture.card:
        raise UserError(
            f"{codec.path}: returns tokens outside the vocabulary of this model: it is the codec of another one"
        )
    return codes.astype(np.int16)
