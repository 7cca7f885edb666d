"""One pass over a source before anything is written: the sha256 of every file, and values that are not finite."""

import hashlib
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from numpy.typing import NDArray
from tqdm import tqdm

from ...quant.casting import count_non_finite
from ..errors import UserError
from ..parallel import cores, in_order
from ..tensorfile import TensorFile

BLOCK = 2 << 20  # bytes read at a time


@dataclass(frozen=True)
class Fingerprint:
    """What identifies a file's content."""

    size: int
    sha256: str


def hash_file(path: Path, bar: "tqdm[Any]") -> Fingerprint:
    """Return size and sha256 of a file, read in blocks."""
    digest, size = hashlib.sha256(), 0
    try:
        with path.open("rb", buffering=0) as file:
            while block := file.read(BLOCK):
                digest.update(block)
                size += len(block)
                bar.update(len(block))
    except OSError as error:
        raise UserError(f"{path}: not readable ({error.strerror or error})") from None
    return Fingerprint(size, digest.hexdigest())


def _blocks(file: TensorFile) -> Iterator[tuple[str, int, int]]:
    """Yield name, first and last row of blocks of a file's tensors, in the order of the file."""
    for name, spec in file.specs.items():
        for first, last in spec.pieces(BLOCK):
            yield name, first, last


def non_finite(file: TensorFile) -> dict[str, int]:
    """Return how many values of which tensors are NaN or infinite; reads all of a file."""

    def count(block: tuple[str, int, int]) -> tuple[str, int]:
        return block[0], count_non_finite(file.read(*block))

    counts: Counter[str] = Counter()
    for name, bad in in_order(count, _blocks(file), cores()):
        counts[name] += bad
    return dict(+counts)


def scan_tensors(file: TensorFile, bar: "tqdm[Any]") -> tuple[Fingerprint, dict[str, int]]:
    """Return the fingerprint of a safetensors file, and how many values of which tensors are NaN or infinite.

    Reads tensor by tensor in the order of the file, which leaves no byte out: the format allows no gaps.
    """
    digest = hashlib.sha256(file.header)
    bar.update(len(file.header))
    bad: dict[str, int] = {}

    def check(block: tuple[str, int, int]) -> tuple[str, NDArray[Any], int]:
        array = file.read(*block)
        return block[0], array, count_non_finite(array)

    for name, array, count in in_order(check, _blocks(file), cores()):
        digest.update(array.reshape(-1).view("u1").data)
        bar.update(array.nbytes)
        if count:
            bad[name] = bad.get(name, 0) + count
    return Fingerprint(file.path.stat().st_size, digest.hexdigest()), bad
