"""Voice presets: what ``voices.tgz`` holds, read without trusting it.

A preset is the start of a session: summed input embeddings for each frame of a recorded prompt, and the ring of
tokens that follows it. The embeddings are sums of the model's own tables, so they belong to one checkpoint.
"""

import re
from collections import Counter
from dataclasses import dataclass
from pathlib import Path, PurePath

import numpy as np
from numpy.typing import NDArray

from ...quant.affine import BFLOAT16
from ..errors import Problem, refuse
from .architecture import Architecture
from .archive import read_archive
from .torch_file import read_tensors

PRESETS = tuple(
    f"{style}{sex}{number}" for style, count in (("NAT", 4), ("VAR", 5)) for sex in "FM" for number in range(count)
)
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]{0,63}")
_OTHER = "was it made for another checkpoint?"
_EMBEDDINGS = (BFLOAT16, np.dtype("<f2"), np.dtype("<f4"))


@dataclass(frozen=True)
class Voice:
    """One preset. embeddings: ``[frames, 1, 1, dim]``, bfloat16 as published. cache: int64 ``[1, streams, slots]``."""

    name: str
    embeddings: NDArray[np.generic]
    cache: NDArray[np.int64]


def read_voices(path: Path, architecture: Architecture) -> tuple[list[Voice], list[str]]:
    """Read every preset of an archive into memory, sorted by name; nothing is unpacked on the disk.

    Returns the voices, and the names of files that are no voices. Raises UserError with all that is wrong: what
    ``read_archive`` refuses, pickles that ask for code, wrong shapes, an archive without voices, and one with some of
    PersonaPlex's presets that lacks others (one with none of them has voices of its own, as many as there are).
    """
    files, others = read_archive(path, is_voice_file)
    voices, problems = [], []
    for name, data in files:
        try:
            voices.append(_voice(name.stem, data, architecture))
        except ValueError as error:
            problems.append(Problem(f"{path}: {name}", str(error)))
    names = Counter(voice.name for voice in voices)
    problems += [Problem(str(path), f"the voice {name} is there twice") for name in sorted(names) if names[name] > 1]
    missing = [name for name in PRESETS if name not in names]
    if missing and not problems and (len(missing) < len(PRESETS) or not names):
        message = f"voices are missing: {', '.join(missing)}"
        problems.append(Problem(str(path), message, "download the archive again, or move it away to do without voices"))
    refuse(problems)
    return sorted(voices, key=lambda voice: voice.name), others


def _voice(name: str, data: bytes, architecture: Architecture) -> Voice:
    tensors = read_tensors(data)
    if set(tensors) != {"embeddings", "cache"}:
        raise ValueError(f"holds {', '.join(map(ascii, sorted(tensors)[:5])) or 'nothing'}, not embeddings and cache")
    for key, dtypes in (("embeddings", _EMBEDDINGS), ("cache", (np.dtype("<i8"),))):
        array = tensors[key]
        if not isinstance(array, np.ndarray) or array.dtype not in dtypes:
            kind = array.dtype if isinstance(array, np.ndarray) else type(array).__name__
            raise ValueError(f"{key} is {kind}: one of {', '.join(map(str, dtypes))} is needed")
    voice = Voice(name, tensors["embeddings"], tensors["cache"])
    check(voice, architecture)
    return voice


def is_voice_name(name: str) -> bool:
    """Tell whether a name is one that a voice may have: letters, digits, - and _."""
    return _NAME.fullmatch(name) is not None


def is_voice_file(name: PurePath) -> bool:
    """Tell whether a member of an archive is a voice, by its name."""
    return name.suffix == ".pt" and is_voice_name(name.stem)


def check(voice: Voice, architecture: Architecture) -> None:
    """Raise ValueError for a voice that does not fit this model."""
    embeddings, cache, streams = voice.embeddings, voice.cache, 1 + architecture.n_q
    if embeddings.ndim != 4 or embeddings.shape[1:] != (1, 1, architecture.dim) or not len(embeddings):
        shape = f"{list(embeddings.shape)}, not [frames, 1, 1, {architecture.dim}]"
        raise ValueError(f"embeddings have shape {shape} ({_OTHER})")
    slots = max(architecture.delays) + 2
    if cache.ndim != 3 or cache.shape[:2] != (1, streams) or not cache.shape[2]:
        raise ValueError(f"cache has shape {list(cache.shape)}, not [1, {streams}, slots]")
    if cache.shape[2] < slots:
        raise ValueError(f"cache has {cache.shape[2]} columns of tokens, where the model's delays need {slots}")
    if not np.isfinite(embeddings.astype(np.float32)).all():
        raise ValueError("embeddings are not finite")
    largest = np.array([architecture.text_card] + [architecture.card] * architecture.n_q)[:, None]
    if not ((cache[0] >= -2) & (cache[0] <= largest)).all():
        raise ValueError(f"cache holds tokens that this model does not have ({_OTHER})")
