"""Reading back what was written, with the library that consumers load it with."""

import hashlib
from collections.abc import Sequence
from pathlib import Path

import mlx.core as mx

from ..errors import CheckFailed
from ..source.scan import BLOCK
from ..tensorfile import DTYPES, Spec


def check_hash(path: Path, size: int, sha256: str) -> None:
    """Read a file and compare size and sha256 with what was written; raises CheckFailed."""
    digest, nbytes = hashlib.sha256(), 0
    with path.open("rb", buffering=0) as file:
        while block := file.read(BLOCK):
            digest.update(block)
            nbytes += len(block)
    if nbytes != size or digest.hexdigest() != sha256:
        raise CheckFailed(
            f"{path}: has {nbytes} bytes with sha256 {digest.hexdigest()}, where {size} with {sha256} were written",
            "check the disk and run the command again",
        )


def check_tensors(path: Path, specs: Sequence[Spec]) -> None:
    """Open a file with ``mx.load`` and compare names, shapes and dtypes with the plan; raises CheckFailed."""
    loaded = mx.load(str(path))
    expected = {spec.name: (spec.shape, getattr(mx, DTYPES[spec.dtype].name)) for spec in specs}
    if not isinstance(loaded, dict):
        raise CheckFailed(f"{path}: mlx reads a single array there, not named tensors")
    actual = {name: (tuple(array.shape), array.dtype) for name, array in loaded.items()}
    for name in sorted(expected.keys() | actual.keys()):
        if expected.get(name) != actual.get(name):
            raise CheckFailed(
                f"{path}: mlx reads {name} as {actual.get(name, 'missing')}, "
                f"the plan says {expected.get(name, 'no such tensor')}"
            )
