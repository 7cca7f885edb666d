"""Voice presets: what ``voices.tgz`` holds, read without trusting it.

A preset is the start of a session: summed input embeddings for each frame of a recorded prompt, and the ring of
tokens that follows it. The embeddings are sums of the model's own tables, so they belong to one checkpoint.
"""

import io
import pickle
import re
import tarfile
import warnings
import zlib
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..quant.affine import BFLOAT16
from .architecture import Architecture
from .problems import UserError, reason, refuse

PRESETS = tuple(
    f"{style}{sex}{number}" for style, count in (("NAT", 4), ("VAR", 5)) for sex in "FM" for number in range(count)
)
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]{0,63}")
_LARGEST_MEMBER = 16 << 20
_LARGEST_ARCHIVE = 1 << 30
_MOST_MEMBERS = 2000
_UNREADABLE = (RuntimeError, ValueError, EOFError, LookupError, OSError, TypeError, AttributeError, AssertionError)


@dataclass(frozen=True)
class Voice:
    """One preset. embeddings: ``[frames, 1, 1, dim]``, bfloat16 as published. cache: int64 ``[1, streams, slots]``."""

    name: str
    embeddings: NDArray[np.generic]
    cache: NDArray[np.int64]


def read_voices(path: Path, architecture: Architecture) -> tuple[list[Voice], list[str]]:
    """Read every preset of an archive into memory, sorted by name; nothing is unpacked on the disk.

    Returns the voices, and the names of files that are no voices. Raises UserError with all that is wrong: members
    that point outside of the archive, links, devices, pickles that ask for code, wrong shapes, a missing preset.
    """
    try:
        with tarfile.open(path, "r:gz") as archive:
            members = _checked(archive, path)
            found, others, problems = [], [], []
            for member in members:
                name = PurePosixPath(member.name)
                if name.suffix != ".pt" or not _NAME.fullmatch(name.stem):
                    others.append(member.name)
                    continue
                data = archive.extractfile(member)
                try:
                    found.append(_voice(name.stem, data.read() if data else b"", architecture))
                except ValueError as error:
                    problems.append(f"{path}: {member.name}: {error}")
    except (OSError, EOFError, tarfile.TarError, zlib.error) as error:
        raise UserError(f"{path}: not a readable .tgz ({error}): download it again") from None
    names = [voice.name for voice in found]
    problems += [f"{path}: the voice {name} is there twice" for name in sorted(set(names)) if names.count(name) > 1]
    missing = [name for name in PRESETS if name not in names]
    if missing and not problems:
        problems.append(f"{path}: voices are missing: {', '.join(missing)}: download the archive again")
    refuse(problems)
    return sorted(found, key=lambda voice: voice.name), others


def _checked(archive: tarfile.TarFile, path: Path) -> list[tarfile.TarInfo]:
    """Return the archive's files, after all of its members were looked at."""
    files, problems, total = [], [], 0
    for number, member in enumerate(archive):
        place = PurePosixPath(member.name)
        total += member.size
        if number >= _MOST_MEMBERS or member.size > _LARGEST_MEMBER or total > _LARGEST_ARCHIVE:
            problems.append(f"{path}: {member.name!r} makes it larger than any archive of voices")
            break  # what follows would be decompressed to be looked at
        if place.is_absolute() or ".." in place.parts or "\\" in member.name:
            problems.append(f"{path}: {member.name!r} points outside of the archive")
        elif member.issym() or member.islnk():
            problems.append(f"{path}: {member.name!r} is a link")
        elif member.isfile():
            files.append(member)
        elif not member.isdir():
            problems.append(f"{path}: {member.name!r} is a device or another special file")
    refuse([f"{problem}: do not use this archive" for problem in problems])
    return files


def _voice(name: str, data: bytes, architecture: Architecture) -> Voice:
    import torch  # a second to import: only where a voice is read

    try:
        with warnings.catch_warnings(action="ignore"):  # torch's advice on old formats is for those who save
            held: Any = torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise ValueError(f"refused, it asks for more than tensors ({reason(error)}): do not use this file") from None
    except _UNREADABLE as error:  # a damaged pickle can end in any of them
        raise ValueError(f"not a voice that torch can read ({reason(error)})") from None
    if not isinstance(held, dict) or set(held) != {"embeddings", "cache"}:
        keys = sorted(map(str, held)) if isinstance(held, dict) else type(held).__name__
        raise ValueError(f"holds {keys}, not embeddings and cache")
    embeddings, cache = held["embeddings"], held["cache"]
    for key, tensor, dtypes in (
        ("embeddings", embeddings, (torch.bfloat16, torch.float16, torch.float32)),
        ("cache", cache, (torch.int64,)),
    ):
        if not isinstance(tensor, torch.Tensor) or tensor.dtype not in dtypes or tensor.layout != torch.strided:
            raise ValueError(f"{key} is {getattr(tensor, 'dtype', type(tensor).__name__)}: one of {dtypes} is needed")
        if not tensor.is_contiguous() or tensor.nbytes > len(data):  # a view can claim more than the file holds
            raise ValueError(f"{key} claims {tensor.nbytes} bytes of a file of {len(data)}")
    embeddings = embeddings.detach()
    half = embeddings.view(torch.uint16).numpy().view(BFLOAT16) if embeddings.dtype == torch.bfloat16 else None
    voice = Voice(name, embeddings.numpy() if half is None else half, cache.detach().numpy())
    check(voice, architecture)
    return voice


def check(voice: Voice, architecture: Architecture) -> None:
    """Raise ValueError for a voice that is none of this model's."""
    embeddings, cache, streams = voice.embeddings, voice.cache, 1 + architecture.n_q
    if embeddings.ndim != 4 or embeddings.shape[1:] != (1, 1, architecture.dim) or not len(embeddings):
        raise ValueError(f"embeddings have shape {list(embeddings.shape)}, not [frames, 1, 1, {architecture.dim}]")
    if cache.ndim != 3 or cache.shape[:2] != (1, streams) or not cache.shape[2]:
        raise ValueError(f"cache has shape {list(cache.shape)}, not [1, {streams}, slots]")
    if not np.isfinite(embeddings.astype(np.float32)).all():
        raise ValueError("embeddings are not finite")
    largest = np.array([architecture.text_card] + [architecture.card] * architecture.n_q)[:, None]
    if not ((cache[0] >= -2) & (cache[0] <= largest)).all():
        raise ValueError("cache holds numbers that are no tokens of this model")
