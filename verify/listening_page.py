"""The page of a blind comparison: pairs of sounds in a random order, and a sealed key that says which is which.

The seal is a courtesy: it keeps names and sides out of sight until the last pair is answered, and its sha256, which is
shown from the beginning, proves that the key was not changed afterwards. Whoever runs the page's script by hand can
open it early.
"""

import base64
import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import version
from importlib.resources import files
from typing import Any

import numpy as np
from jinja2 import Environment, StrictUndefined
from markupsafe import Markup

from ..convert.bundle.manifest import TOOLKIT

_WORD = (1 << 32) - 1


@dataclass(frozen=True)
class Side:
    """A bundle as the end of the page names it."""

    name: str
    recipe: str
    fingerprint: str


@dataclass(frozen=True)
class Question:
    """A recording: its file's name, and its sound as a data URI."""

    file: str
    sound: str


@dataclass(frozen=True)
class Pair:
    """Two answers to a question (by its number) with one seed, as data URIs."""

    question: int
    seed: int
    a: str
    b: str


@dataclass(frozen=True)
class SoundPage:
    """What a page is made of."""

    a: Side
    b: Side
    questions: Sequence[Question]
    pairs: Sequence[Pair]
    seed: int
    voice: str


@dataclass(frozen=True)
class Rendered:
    """A page, and the sha256 of its key."""

    html: str
    seal: str


def render(page: SoundPage) -> Rendered:
    """Return the page. Order and sides follow from the seed and all sounds: they are the same if it is made again.

    They differ from page to page, so that nobody who has seen the end of one knows those of the next.
    """
    random = np.random.default_rng(np.frombuffer(_digest(page), np.uint32))
    order = [page.pairs[number] for number in random.permutation(len(page.pairs))]
    a_is_x = [bool(side) for side in random.integers(0, 2, len(order))]
    key = {
        "a": asdict(page.a),
        "b": asdict(page.b),
        "x": ["a" if first else "b" for first in a_is_x],
        "equal": [number for number, pair in enumerate(order, 1) if pair.a == pair.b],
        "salt": random.bytes(16).hex(),
    }
    text = json.dumps(key, ensure_ascii=True, separators=(",", ":"))
    start = int(random.integers(1, _WORD))
    seal = hashlib.sha256(text.encode()).hexdigest()
    sides = [(pair.a, pair.b) if first else (pair.b, pair.a) for pair, first in zip(order, a_is_x, strict=True)]
    data = {
        "toolkit": f"{TOOLKIT} {version(TOOLKIT)}",
        "seal": seal,
        "sealed": [start, base64.b64encode(masked(text.encode(), start)).decode()],
        "seed": page.seed,
        "voice": page.voice,
        "questions": [asdict(question) for question in page.questions],
        "pairs": [
            {"question": pair.question, "seed": pair.seed, "x": x, "y": y}
            for pair, (x, y) in zip(order, sides, strict=True)
        ],
    }
    return Rendered(_html(data), seal)


def masked(data: bytes, start: int) -> bytes:
    """Return bytes, each combined with one of a xorshift generator's (Marsaglia 2003); the same again undoes it."""
    state, mask = start, bytearray()
    for _ in data:
        state ^= state << 13 & _WORD
        state ^= state >> 17
        state ^= state << 5 & _WORD
        mask.append(state & 0xFF)
    return bytes(one ^ other for one, other in zip(data, mask, strict=True))


def _digest(page: SoundPage) -> bytes:
    """Return a sha256 of the seed and all sounds."""
    digest = hashlib.sha256(str(page.seed).encode())
    for pair in page.pairs:
        digest.update(f"\n{pair.a}\n{pair.b}".encode())
    return digest.digest()


def _html(data: dict[str, Any]) -> str:
    """Return the page as text; only its own script and style run, and nothing is loaded from anywhere."""
    environment = Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True, undefined=StrictUndefined)
    folder = files(__package__) / "templates"
    template, script, style = ((folder / f"listen.{kind}").read_text("utf-8") for kind in ("html", "js", "css"))
    # < is written as an escape, so that no name can end the element
    text = json.dumps(data, ensure_ascii=True, separators=(",", ":")).replace("<", "\\u003c")
    return (
        environment.from_string(template).render(
            script=Markup(script),  # noqa: S704  (a file of this package)
            style=Markup(style),  # noqa: S704
            script_hash=_hash(script),
            style_hash=_hash(style),
            data=Markup(text),  # noqa: S704  (escaped above)
            count=len(data["pairs"]),
        )
        + "\n"
    )


def _hash(text: str) -> str:
    return "sha256-" + base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
