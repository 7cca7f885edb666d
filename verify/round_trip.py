"""A bundle answers a recording aloud, and a speech recognizer transcribes the answer.

The model predicts its words twice, as text and as audio: where the transcript differs from the text, one of them broke.
The recognizer also transcribes the question, as it is and through the codec alone: the difference is its own error.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..convert.bundle.reader import layout_of
from ..convert.errors import UserError, printable
from ..convert.file_names import CODEC
from ..convert.progress import bar
from ..convert.source.mimi import FRAME, RATE
from ..model.forward import Floats, Tokens
from ..speak import audio_files
from ..speak.codec import Codec
from ..speak.speaker import SpeakOptions, open_speaker, text_of
from . import recognizer
from .limits import Failure, failure
from .options import EMBEDDED
from .records import Answer, Question, RoundTrip, RoundTripLimits, Session, Sounds

CHECK = "round trip"  # of the reasons in a verdict
_MOST_WRONG = 0.75  # word error rate of an answer; above, most words are lost
_MOST_SILENT = 0.98  # share of frames
_MOST_CLIPPED = 0.01  # share of samples
_MOST_REPEATS = 5  # of a phrase, one after another
_LONGEST_LOOP = 6.0  # seconds in which two seconds of sound or less are repeated
_FLOOR = 0.5  # word error rate of the question through the codec, up to which the recognizer is trusted
LIMITS = RoundTripLimits(
    word_error_rate=_MOST_WRONG,
    silent=_MOST_SILENT,
    clipped=_MOST_CLIPPED,
    repeats=_MOST_REPEATS,
    looped=_LONGEST_LOOP,
    floor=_FLOOR,
)
_FEWEST = 3  # words of which an error rate means something
_QUIET = 10 ** (-50 / 20)  # root mean square below which a frame is silent
_LOUD = 0.999
_PHRASE = 8  # words
_LOOP = 25  # frames: 2 seconds
_SHOWN = 30  # seconds of sound in a report


def run(
    bundle: Path, question: Path, options: SpeakOptions, listener: str = EMBEDDED, quiet: bool = False
) -> RoundTrip:
    """Let a bundle answer a recording, and measure the answer (docs/verification.md); see ``failures``.

    Raises UserError for what cannot be read or loaded.
    """
    transcribe = _listening(listener)
    with audio_files.reading(question) as (count, frames):
        if count > audio_files.LONGEST * RATE:
            raise UserError(f"{question}: longer than an hour: cut it")
        asked = np.concatenate(list(frames))
    speaker = open_speaker(bundle, options)
    with bar("speaking", len(asked) // FRAME, "frame", quiet) as progress:
        frames_out = []
        for frame in speaker.answer(asked.reshape(-1, FRAME)):
            frames_out.append(frame)
            progress.update(1)
    answer = np.concatenate([frame.samples for frame in frames_out])[:count]
    text, tokens = text_of(frame.text for frame in frames_out), np.stack([frame.agent for frame in frames_out])
    speaker.codec.reset()
    return RoundTrip(
        question=_question(question, count, asked, speaker.codec, transcribe),
        answer=judged(answer, tokens, text, transcribe),
        session=Session(speaker.conversation.voice.name or "no voice", options.prompt, options.seed, speaker.wrapped),
        recognizer=listener,
        limits=LIMITS,
        audio=Sounds(_embedded(asked[:count]), _embedded(answer)),
    )


def check(bundle: Path, question: Path, codec: Path | None, listener: str = EMBEDDED) -> None:
    """Raise UserError for what a round trip would end with, before anything that takes long."""
    _, layout = layout_of(bundle)
    recognizer.load(listener)
    word_error_rate("", "")
    with audio_files.reading(question):
        Codec(codec or bundle / layout.target.copies[CODEC], layout.architecture.n_q // 2)


def _listening(listener: str) -> recognizer.Transcribe:
    transcribe = recognizer.load(listener)
    return lambda samples: printable(" ".join(transcribe(samples).split()))


def _question(file: Path, count: int, asked: Floats, codec: Codec, transcribe: recognizer.Transcribe) -> Question:
    """Return the transcripts of a question of ``count`` samples, as it is and through the codec alone."""
    through = np.concatenate([codec.decode(codec.encode(frame)) for frame in asked.reshape(-1, FRAME)])
    transcript, coded = (transcribe(resampled(samples)) for samples in (asked, through))
    return Question(
        file=printable(file.name),
        seconds=count / RATE,
        transcript=transcript,
        through_codec=coded,
        word_error_rate=word_error_rate(transcript, coded),
    )


def judged(answer: Floats, tokens: Tokens, text: str, transcribe: recognizer.Transcribe) -> Answer:
    """Return the figures of an answer; tokens ``[frames, codebooks]`` and text are the model's predictions."""
    loud = loudness(answer) >= _QUIET
    transcript = transcribe(resampled(answer))
    return Answer(
        seconds=len(answer) / RATE,
        text=text,
        transcript=transcript,
        word_error_rate=word_error_rate(text, transcript),
        silent=float(1 - loud.mean()),
        clipped=float((np.abs(answer) >= _LOUD).mean()),
        repeats=repeated_words(text.lower().split()),
        looped=repeated_sound(tokens[: len(loud)], loud),
    )


def failures(answer: Answer, floor: float | None) -> list[Failure]:
    """Return why an answer does not pass; floor: word error rate of the question, None if it has too few words."""
    reasons = []
    if answer.silent > _MOST_SILENT:
        reasons.append("the answer is silent")
    if answer.clipped > _MOST_CLIPPED:
        reasons.append(f"{answer.clipped:.1%} of the answer's samples are clipped")
    if answer.repeats >= _MOST_REPEATS:
        reasons.append(f"the answer repeats a phrase {answer.repeats} times in a row")
    if answer.looped >= _LONGEST_LOOP:
        reasons.append(f"the answer repeats the same sound for {answer.looped:.1f} s")
    rate = answer.word_error_rate
    if rate is not None and rate > _MOST_WRONG and floor is not None and floor <= _FLOOR:
        reasons.append(f"the transcript of the answer is not its text: {rate:.0%} of the words are wrong")
    return [failure(CHECK, "answer", reason) for reason in reasons]


def word_error_rate(text: str, transcript: str) -> float | None:
    """Return how many words of a transcript are wrong, over those of the text; None for fewer than three words."""
    try:
        import jiwer
    except ImportError:
        raise UserError(recognizer.MISSING) from None
    steps = [
        jiwer.ToLowerCase(),
        jiwer.SubstituteRegexes({r"[^\w\s']": " "}),
        jiwer.RemoveMultipleSpaces(),
        jiwer.Strip(),
    ]
    plain = jiwer.Compose(steps)
    if len(plain(text).split()) < _FEWEST:
        return None
    return float(jiwer.wer(plain(text), plain(transcript)))


def loudness(samples: Floats) -> NDArray[np.float64]:
    """Return the root mean square of each frame, 1 for full scale."""
    padded = np.pad(samples, (0, -len(samples) % FRAME)).reshape(-1, FRAME)
    frames: NDArray[np.float64] = np.sqrt(np.square(padded, dtype=np.float64).mean(1))
    return frames


def repeated_words(words: Sequence[str]) -> int:
    """Return how many times in a row a phrase of up to eight words occurs, at most."""
    return max((_run(words, size) for size in range(1, _PHRASE + 1)), default=1)


def repeated_sound(tokens: Tokens, loud: NDArray[np.bool_]) -> float:
    """Return for how many seconds two seconds of sound or less come again, token for token, three times at least."""
    frames = [
        tuple(frame) if is_loud else number
        for number, (frame, is_loud) in enumerate(zip(tokens.tolist(), loud, strict=False))
    ]
    runs = [(_run(frames, size), size) for size in range(1, _LOOP + 1)]
    return max((times * size for times, size in runs if times >= 3), default=0) * FRAME / RATE


def _run(items: Sequence[Any], size: int) -> int:
    """Return how many times in a row some ``size`` items come, at most."""
    longest = run = 0
    for first, second in zip(items, items[size:], strict=False):
        run = run + 1 if first == second else 0
        longest = max(longest, run)
    return 1 + longest // size


def resampled(samples: Floats) -> Floats:
    """Return samples at the recognizers' rate."""
    import soxr

    slower: Floats = soxr.resample(samples, RATE, recognizer.RATE)
    return slower


def _embedded(samples: Floats) -> str:
    """Return the beginning of a sound as a data URI."""
    return audio_files.data_uri(samples[: _SHOWN * RATE])
