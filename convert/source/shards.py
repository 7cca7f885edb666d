"""Weights in shards: the safetensors files that ``model.safetensors.index.json`` lists, read as one."""

import re
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from numpy.typing import NDArray

from ..errors import Problem, UserError, reason, refuse
from ..hints import Hint
from ..regular_files import read_json
from ..tensorfile import Spec, TensorFile

LARGEST_INDEX = 16 << 20  # bytes; that of the 7B model would have 50 thousand
_MOST_SHARDS = 512  # each is an open file
_LISTED = 5  # tensors named for one problem
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.+-]{0,187}\.safetensors")


def read_index(path: Path) -> dict[str, str]:
    """Return which shard holds each tensor, as an index says it; raises UserError for what is not an index.

    Shards are plain names of safetensors files beside it.
    """
    try:
        data = read_json(path, LARGEST_INDEX)
    except (ValueError, RecursionError) as error:
        raise UserError(Problem(str(path), f"not readable as JSON ({reason(error)})", Hint.DOWNLOAD_AGAIN)) from None
    shards = data.get("weight_map") if isinstance(data, dict) else None
    if not isinstance(shards, dict) or not shards:
        raise UserError(Problem(str(path), "has no weight_map, which says where each tensor is", Hint.DOWNLOAD_AGAIN))
    for tensor, shard in shards.items():
        if not isinstance(shard, str) or not _NAME.fullmatch(shard):
            why = "not the plain name of a safetensors file: do not trust this source"
            raise UserError(f"{path}: {tensor!a:.80} is in {shard!a:.80}, {why}")
    count = len(set(shards.values()))
    if count > _MOST_SHARDS:
        raise UserError(f"{path}: lists {count} shards: at most {_MOST_SHARDS} are read: join them to fewer")
    return shards


class ShardedFile:
    """Open shards, a context manager: names, shapes and rows of all their tensors, as ``TensorFile`` gives them."""

    def __init__(self, index: Path) -> None:
        """Open every shard; raises UserError if the index and the shards do not hold exactly the same tensors."""
        self.path = index
        placed = read_index(index)
        self.files: tuple[TensorFile, ...] = ()
        with ExitStack() as stack:
            files = {}
            for name in sorted(set(placed.values())):
                files[name] = TensorFile(index.with_name(name))
                stack.callback(files[name].close)
            refuse(_contradictions(index, placed, files))
            self._stack = stack.pop_all()
        self.files = tuple(files.values())
        self._by_tensor = {tensor: file for file in files.values() for tensor in file.offsets}
        self.offsets = {tensor: offset for file in self.files for tensor, offset in file.offsets.items()}
        self.specs: dict[str, Spec] = {tensor: spec for file in self.files for tensor, spec in file.specs.items()}
        self.unknown = {tensor: dtype for file in self.files for tensor, dtype in file.unknown.items()}
        self.doubled = sorted({tensor for file in self.files for tensor in file.doubled})

    @property
    def nbytes(self) -> int:
        """Bytes of all shards."""
        return sum(file.nbytes for file in self.files)

    def read(self, name: str, first: int, last: int, once: bool = False) -> NDArray[Any]:
        """Return rows of a tensor, as ``TensorFile.read`` does."""
        return self._by_tensor[name].read(name, first, last, once)

    def changed(self) -> list[Path]:
        """Return the shards that are not what they were when they were opened."""
        return [path for file in self.files for path in file.changed()]

    def close(self) -> None:
        """Close every shard; a second call does nothing."""
        self._stack.close()


Weights = TensorFile | ShardedFile


def files_of(weights: Weights) -> tuple[TensorFile, ...]:
    """Return the files that weights are read from."""
    return weights.files if isinstance(weights, ShardedFile) else (weights,)


def open_weights(folder: Path, names: tuple[str, ...], index: str | None) -> Weights:
    """Open a source's weights, to be closed: one file, or the shards of an index."""
    return ShardedFile(folder / index) if index else TensorFile(folder / names[0])


def _contradictions(index: Path, placed: dict[str, str], files: dict[str, TensorFile]) -> list[Problem]:
    """Return what of an index is not as the shards are; a tensor must be in the one shard that is named for it."""
    problems: list[Problem] = []

    def tell(tensors: list[str], what: Callable[[str], str]) -> None:
        problems.extend(Problem(f"{index}: {tensor}", what(tensor)) for tensor in tensors[:_LISTED])
        if len(tensors) > _LISTED:
            problems.append(Problem(str(index), f"and {len(tensors) - _LISTED} more tensors like these"))

    lacking = [tensor for tensor, shard in placed.items() if tensor not in files[shard].offsets]
    tell(lacking, lambda tensor: f"is not in {placed[tensor]}, which is named for it")
    others = {
        tensor: name for name, file in files.items() for tensor in file.offsets if placed.get(tensor, name) != name
    }
    tell(list(others), lambda tensor: f"is in {others[tensor]} as well as in {placed[tensor]}")
    extra = {tensor: name for name, file in files.items() for tensor in file.offsets if tensor not in placed}
    tell(list(extra), lambda tensor: f"is in {extra[tensor]}, and the index does not name it")
    return problems
