"""Two bundles answer the same recordings, and a page lets people compare the answers without knowing which is which."""

import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from ..convert.bundle.describe import counted
from ..convert.bundle.destination import check_new_file
from ..convert.bundle.location import published_as
from ..convert.bundle.manifest import manifest_of
from ..convert.bundle.workspace import write_durably
from ..convert.errors import UserError, printable
from ..convert.progress import long_step
from ..convert.source.mimi import FRAME, RATE
from ..convert.source.recorded_voice import SUFFIX
from ..model.forward import Floats
from ..model.mlx_device import computing_on
from ..model.prompt import PROMPT
from ..speak import audio_files
from ..speak.recorded_voices import is_path
from ..speak.sampling import sampling_in
from ..speak.speaker import SpeakOptions, check_speaker, open_speaker
from .listening_page import Pair, Question, Side, SoundPage, render

_LONGEST = 60  # seconds of a recording
_SOUND = 900  # seconds of answers of each bundle: a page of some 60 MB
_MOST_PAIRS = 100
_LONGEST_REPLY = 60.0  # seconds
PAGE = "listen.html"
_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class ListenOptions:
    """What both bundles answer. pairs: of answers. seed: of the first one; it also decides the order, with the sounds.

    reply: seconds of silence after each recording, in which it is answered. voice: of both, or the file of
    ``ppx-voice``; None for the usual one. prompt: of both. codec: Mimi's
    weights for both, None for each bundle's own. device: None for MLX's choice.
    """

    pairs: int = 10
    seed: int = 0
    reply: float = 8.0
    voice: str | None = None
    prompt: str = PROMPT
    codec: Path | None = None
    device: str | None = None

    def __post_init__(self) -> None:
        """Raise UserError for values out of range."""
        if not 1 <= self.pairs <= _MOST_PAIRS:
            raise UserError(f"{self.pairs} pairs: use 1 to {_MOST_PAIRS}")
        if not 0 <= self.seed < 1 << 62:
            raise UserError(f"the seed is {self.seed}: use a whole number from 0 to {(1 << 62) - 1}")
        if not 0 <= self.reply <= _LONGEST_REPLY:
            raise UserError(f"{self.reply} s for the reply: use 0 to {_LONGEST_REPLY:g}")
        if self.voice and is_path(self.voice) and not self.voice.endswith(SUFFIX):
            raise UserError(f"{self.voice}: not a voice: make one of a recording with ppx-voice first")


@dataclass(frozen=True)
class ListeningPage:
    """A page that was written. pairs: how many it has; equal: of them with the same sound by both.

    seconds: of an answer on average. nbytes: of the file. seal: sha256 of the key, which says what is A and what B.
    """

    output: Path
    pairs: int
    equal: int
    seconds: float
    nbytes: int
    seal: str


def listen(
    a: str | Path,
    b: str | Path,
    questions: Sequence[str | Path],
    output: str | Path = PAGE,
    options: ListenOptions | None = None,
    *,
    quiet: bool = True,
) -> ListeningPage:
    """Let two bundles answer recordings with the same seeds, and write a page for a blind comparison.

    Example::

        listen("my-4bit", "my-8bit", ["question.wav"], "listen.html", ListenOptions(pairs=12))

    Recordings take turns, and each has a new seed every time. Sampling is that of ``a``. Raises UserError for what
    cannot be read or loaded, before anything that takes long.
    """
    options, target, folders = options or ListenOptions(), Path(output), (Path(a), Path(b))
    check_new_file(target, ".html", force=None)
    if not questions:
        raise UserError("no recording to answer: give at least one")
    files = [Path(question) for question in questions]
    if len(files) > options.pairs:
        wanted = counted(options.pairs, "pair")
        raise UserError(f"{len(files)} recordings for {wanted}: give at least as many pairs as recordings")
    side_a, side_b = (_side(folder) for folder in folders)
    asked = [_question(file) for file in files]
    turns = [(number % len(asked), options.seed + number // len(asked)) for number in range(options.pairs)]
    seconds = sum(len(asked[question]) / RATE + options.reply for question, _ in turns)
    if seconds > _SOUND:
        raise UserError(
            f"{seconds / 60:.0f} minutes of answers by each bundle: at most {_SOUND // 60} fit a page: use fewer pairs "
            "or shorter recordings"
        )
    sampling = sampling_in(folders[0])
    if sampling != sampling_in(folders[1]):
        _log.warning("the bundles' config.json differ in sampling: both answer with that of %s", folders[0])
    padded = [_padded(samples, options.reply) for samples in asked]
    speaking = SpeakOptions(options.voice, options.prompt, sampling, options.seed, codec=options.codec)
    voice, of_b = (check_speaker(folder, speaking) for folder in folders)
    if voice != of_b:
        raise UserError(f"A would speak as {voice or 'no voice'}, B as {of_b or 'no voice'}: choose a voice of both")
    with computing_on(options.device):
        sounds = [
            list(_answers(folder, letter, padded, turns, speaking, quiet))
            for folder, letter in zip(folders, "AB", strict=True)
        ]
    pairs = [Pair(question, seed, *both) for (question, seed), *both in zip(turns, *sounds, strict=True)]
    shown = [Question(printable(file.name), audio_files.data_uri(one)) for file, one in zip(files, asked, strict=True)]
    page = render(SoundPage(side_a, side_b, shown, pairs, options.seed, printable(voice or "no voice")))
    write_durably(target, page.html)
    equal = sum(pair.a == pair.b for pair in pairs)
    return ListeningPage(target, len(pairs), equal, seconds / len(pairs), target.stat().st_size, page.seal)


def _side(folder: Path) -> Side:
    """Return what the page says of a bundle in the end."""
    manifest = manifest_of(folder)
    published = published_as(folder)
    return Side(
        printable(published[0] if published else folder.resolve().name),
        printable(manifest.recipe.name),
        manifest.fingerprint,
    )


def _question(path: Path) -> Floats:
    """Read a recording as samples at Mimi's rate; raises UserError for one that is too long."""
    with audio_files.reading(path) as (count, frames):
        if count > _LONGEST * RATE:
            raise UserError(f"{path}: {count / RATE:.0f} s long: at most {_LONGEST} s fit a page: cut it")
        return np.concatenate(list(frames))[:count]


def _padded(samples: Floats, reply: float) -> Floats:
    """Return a question and the silence after it, as frames ``[frames, FRAME]``."""
    after = round(reply * RATE)
    return np.pad(samples, (0, after + -(len(samples) + after) % FRAME)).reshape(-1, FRAME)


def _answers(
    folder: Path,
    letter: str,
    questions: Sequence[Floats],
    turns: Sequence[tuple[int, int]],
    options: SpeakOptions,
    quiet: bool,
) -> Iterator[str]:
    """Yield a bundle's answers as data URIs, in the order of the turns: question and seed."""
    speaker = open_speaker(folder, replace(options, seed=turns[0][1]), silent=quiet)
    frames = sum(len(questions[question]) for question, _ in turns)
    with long_step(f"{letter}: {len(turns)} answers", frames, "frame", quiet) as progress:
        for number, (question, seed) in enumerate(turns):
            if number:
                speaker.restart(seed)
            answer = []
            for frame in speaker.answer(questions[question]):
                answer.append(frame.samples)
                progress.update(1)
            yield audio_files.data_uri(np.concatenate(answer))
    if speaker.wrapped:
        card = speaker.conversation.runtime.architecture.card
        _log.warning("%s knows %d of the codec's tokens: the question's were taken modulo that", folder, card)
