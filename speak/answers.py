"""Answering a recording, or a person at the microphone."""

import logging
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from ..convert.bundle.manifest import manifest_of
from ..convert.progress import bar
from ..convert.source import demo
from ..convert.source.mimi import FRAME, RATE
from . import audio_files, microphone
from .speaker import Speaker, SpeakOptions, open_speaker, text_of

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Answer:
    """An answer to a recording. seconds: of sound. took: seconds of work. voice: its name, empty for no voice."""

    output: Path
    text: str
    seconds: float
    took: float
    voice: str = ""

    @property
    def line(self) -> str:
        """What is printed of it."""
        factor = self.took / self.seconds
        return f"{self.output}: {self.seconds:.1f} s of sound, made in {self.took:.1f} s ({factor:.2f} times real time)"


def made_of_noise(bundle: str | Path) -> str | None:
    """Return the line for a bundle whose weights are random, so that its words mean nothing; None for others."""
    source = manifest_of(Path(bundle)).source.id
    if source not in demo.SIZES:
        return None
    return f"{bundle}: made from {source}, whose weights are random: its words are noise and are not shown"


def answer(
    bundle: str | Path,
    question: str | Path,
    output: str | Path,
    options: SpeakOptions | None = None,
    *,
    show: Callable[[str], None] = lambda _: None,
    quiet: bool = True,
    silent: bool = True,
) -> Answer:
    """Answer a recording with a bundle; writes a WAV of the same length.

    options: None for the usual ones. show: called with each piece of text as it comes. quiet: no progress bar.
    silent: not to announce what takes long. Raises UserError for what cannot be read or loaded.
    """
    path, pieces = Path(output), []
    with audio_files.reading(Path(question)) as (count, frames):  # mistakes there come before a model is loaded
        speaker = _opened(bundle, options, silent)
        began = time.perf_counter()
        with audio_files.writing(path, count) as write, bar("speaking", -(-count // FRAME), "frame", quiet) as progress:
            for frame in speaker.answer(frames):
                write(frame.samples)
                progress.update(1)
                pieces.append(frame.text)
                show(frame.text)
    took = time.perf_counter() - began
    if speaker.wrapped:
        card = speaker.conversation.runtime.architecture.card
        _log.warning("this model knows %d of the codec's tokens: the question's were taken modulo that", card)
    return Answer(path, text_of(pieces), count / RATE, took, speaker.conversation.voice.name)


def talk(
    bundle: str | Path,
    options: SpeakOptions | None = None,
    *,
    show: Callable[[str], None] = lambda _: None,
    ready: Callable[[], None] = lambda: None,
    silent: bool = True,
) -> None:
    """Talk through the machine's microphone and speaker until interrupted.

    ready: called when it listens. options, show, silent: as in ``answer``.
    """
    microphone.check()
    speaker = _opened(bundle, options, silent)
    for _ in speaker.answer([np.zeros(FRAME, np.float32)] * 2):  # a moment of silence, in which functions are compiled
        pass
    with microphone.devices() as (frames, play), suppress(KeyboardInterrupt):
        ready()
        for frame in speaker.answer(frames):
            play(frame.samples)
            show(frame.text)


def _opened(bundle: str | Path, options: SpeakOptions | None, silent: bool) -> Speaker:
    speaker = open_speaker(Path(bundle), options or SpeakOptions(), silent)
    for line in speaker.conversation.runtime.matmul.workarounds():
        _log.warning("MLX computes quantized_matmul wrongly here; worked around: %s", line)
    return speaker
