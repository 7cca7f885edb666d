"""Does the answer make sense to a listener? A bundle speaks, a recognizer writes down what it hears of it.

The model says its words twice, as text and as sound: where what is heard is not what was meant, one of them broke. The
same recognizer on the question, once as it is and once through the codec alone, tells how much of that is its own.
"""

import base64
import io
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
from .limits import failure
from .options import EMBEDDED

CHECK = "round trip"  # of the reasons in a verdict
LIMITS = {
    "word_error_rate": 0.75,  # of an answer; above, most words are lost
    "silent": 0.98,  # share of frames
    "clipped": 0.01,  # share of samples
    "repeats": 5,  # of a phrase, one after another
    "looped": 6.0,  # seconds in which two seconds of sound or less come again and again
}
_FLOOR = 0.5  # word error rate of the question through the codec, up to which the recognizer is believed
_FEWEST = 3  # words from which an error rate says something
_QUIET = 10 ** (-50 / 20)  # root mean square below which a frame is silent
_LOUD = 0.999
_PHRASE = 8  # words
_LOOP = 25  # frames: 2 seconds
_SHOWN = 30  # seconds of sound in a report


def run(
    bundle: Path, question: Path, options: SpeakOptions, listener: str = EMBEDDED, quiet: bool = False
) -> dict[str, Any]:
    """Let a bundle answer a recording, and judge the answer; return what a report says of it (docs/verification.md).

    Raises UserError for what cannot be read or loaded.
    """
    transcribe = _listening(listener)
    with audio_files.reading(question) as (count, frames):
        if count > audio_files.LONGEST * RATE:
            raise UserError(f"{question}: longer than an hour: cut it")
        asked = np.concatenate(list(frames))
    speaker = open_speaker(bundle, options)
    with bar("speaking", len(asked) // FRAME, "frame", quiet) as progress:
        said = []
        for one in speaker.answer(asked.reshape(-1, FRAME)):
            said.append(one)
            progress.update(1)
    answer = np.concatenate([one.samples for one in said])[:count]
    text, tokens = text_of(one.text for one in said), np.stack([one.agent for one in said])
    speaker.codec.reset()
    floor = _floor(speaker.codec, asked, transcribe)
    found = {
        "question": {"file": printable(question.name), "seconds": count / RATE} | floor,
        "answer": judged(answer, tokens, text, transcribe),
        "scene": {"voice": options.voice, "prompt": options.prompt, "seed": options.seed, "folded": speaker.wrapped},
        "recognizer": listener,
        "limits": LIMITS | {"floor": _FLOOR},
        "audio": {"question": _embedded(asked[:count]), "answer": _embedded(answer)},
    }
    return found | {"failures": failures(found)}


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


def _floor(codec: Codec, asked: Floats, transcribe: recognizer.Transcribe) -> dict[str, Any]:
    """Return what is heard of a question as it is, and through the codec alone."""
    through = np.concatenate([codec.decode(codec.encode(frame)) for frame in asked.reshape(-1, FRAME)])
    heard, coded = (transcribe(resampled(samples)) for samples in (asked, through))
    return {"heard": heard, "through_codec": coded, "word_error_rate": word_error_rate(heard, coded)}


def judged(answer: Floats, tokens: Tokens, text: str, transcribe: recognizer.Transcribe) -> dict[str, Any]:
    """Return what an answer is found to be; tokens ``[frames, codebooks]`` and text are what the model meant."""
    loud = loudness(answer) >= _QUIET
    heard = transcribe(resampled(answer))
    return {
        "seconds": len(answer) / RATE,
        "text": text,
        "heard": heard,
        "word_error_rate": word_error_rate(text, heard),
        "silent": float(1 - loud.mean()),
        "clipped": float((np.abs(answer) >= _LOUD).mean()),
        "repeats": repeated_words(text.lower().split()),
        "looped": repeated_sound(tokens[: len(loud)], loud),
    }


def failures(found: dict[str, Any]) -> list[dict[str, str]]:
    """Return why an answer does not pass."""
    answer, floor = found["answer"], found["question"]["word_error_rate"]
    reasons = []
    if answer["silent"] > LIMITS["silent"]:
        reasons.append("the answer is silent")
    if answer["clipped"] > LIMITS["clipped"]:
        reasons.append(f"{answer['clipped']:.1%} of the answer's samples are clipped")
    if answer["repeats"] >= LIMITS["repeats"]:
        reasons.append(f"the answer says the same {answer['repeats']} times over")
    if answer["looped"] >= LIMITS["looped"]:
        reasons.append(f"the answer repeats the same sound for {answer['looped']:.1f} s")
    rate = answer["word_error_rate"]
    if rate is not None and rate > LIMITS["word_error_rate"] and floor is not None and floor <= _FLOOR:
        reasons.append(f"the recognizer hears other words than the model means: {rate:.0%} are wrong")
    return [failure(CHECK, "answer", reason) for reason in reasons]


def word_error_rate(meant: str, heard: str) -> float | None:
    """Return how many words are wrong, over those that were meant; None for so few that it says nothing."""
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
    if len(plain(meant).split()) < _FEWEST:
        return None
    return float(jiwer.wer(plain(meant), plain(heard)))


def loudness(samples: Floats) -> NDArray[np.float64]:
    """Return the root mean square of each frame, 1 for full scale."""
    padded = np.pad(samples, (0, -len(samples) % FRAME)).reshape(-1, FRAME)
    found: NDArray[np.float64] = np.sqrt(np.square(padded, dtype=np.float64).mean(1))
    return found


def repeated_words(words: Sequence[str]) -> int:
    """Return how many times in a row a phrase of up to eight words is said, at most."""
    return max((_run(words, size) for size in range(1, _PHRASE + 1)), default=1)


def repeated_sound(tokens: Tokens, loud: NDArray[np.bool_]) -> float:
    """Return for how many seconds two seconds of sound or less come again, token for token, three times at least."""
    frames = [
        tuple(frame) if heard else number
        for number, (frame, heard) in enumerate(zip(tokens.tolist(), loud, strict=False))
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

    found: Floats = soxr.resample(samples, RATE, recognizer.RATE)
    return found


def _embedded(samples: Floats) -> str:
    """Return the beginning of a sound as a data URI that browsers play."""
    import soundfile

    file = io.BytesIO()
    soundfile.write(file, samples[: _SHOWN * RATE], RATE, format="FLAC", subtype="PCM_16")
    return "data:audio/flac;base64," + base64.b64encode(file.getvalue()).decode()
