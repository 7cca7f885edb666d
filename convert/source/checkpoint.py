"""An open source checkpoint: its tensors by role, a way to read their rows, and everything that is wrong with it."""

import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from ..errors import Problem, UserError, refuse
from ..file_names import CONFIG
from ..hints import Hint
from ..tensorfile import DTYPES, FLOATS, Spec
from .architecture import PERSONAPLEX_STEPS, Architecture
from .shards import Weights, open_weights
from .tensors import Role, roles, stored_as

MOSHI_STEPS = 8
ZEROS = "zeros"


@dataclass(frozen=True)
class TensorRows:
    """Rows 0 to ``rows`` of a tensor in the files, or rows of zeros where ``tensor`` is ZEROS."""

    tensor: str
    rows: int


@dataclass(frozen=True)
class Tensor:
    """A tensor of the checkpoint: its role, its dtype, and the stored tensors that make up its rows."""

    role: Role
    spec: Spec
    parts: tuple[TensorRows, ...]


@dataclass(frozen=True)
class Checkpoint:
    """An open checkpoint, a context manager; every tensor of its architecture is there and has the right shape.

    Closing it also closes the file of its adapter, and what was derived from it (``trimmed``, ``with_adapter``).
    file: one safetensors file, or shards that are read as one.
    filled: what was copied from other steps, by name of the tensor that was incomplete or missing.
    merge: (name, first row, rows) -> the rows with an adapter merged, in float32, for the tensors in ``merged``; it
    reads ``merge_file``.
    """

    file: Weights
    architecture: Architecture
    tensors: dict[str, Tensor]
    copied_steps: dict[str, str]
    merge: Callable[[str, int, NDArray[Any]], NDArray[Any]] | None = None
    merged: frozenset[str] = frozenset()
    merge_file: Weights | None = None

    def close(self) -> None:
        """Close its files."""
        self.file.close()
        if self.merge_file:
            self.merge_file.close()

    def changed(self) -> list[Path]:
        """Return those of its files that are not what they were when they were opened."""
        return [path for file in (self.file, self.merge_file) if file for path in file.changed()]

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def with_adapter(
        self, merge: Callable[[str, int, NDArray[Any]], NDArray[Any]], merged: Iterable[str], file: Weights
    ) -> "Checkpoint":
        """Return the checkpoint that reads as if an adapter had been merged into some of its tensors."""
        names = frozenset(merged)
        tensors = {
            name: replace(tensor, spec=replace(tensor.spec, dtype="F32")) if name in names else tensor
            for name, tensor in self.tensors.items()
        }
        return replace(self, tensors=tensors, merge=merge, merged=names, merge_file=file)

    def trimmed(self, steps: int) -> "Checkpoint":
        """Return the checkpoint of a model with only the first depformer steps."""
        architecture = replace(self.architecture, steps=steps)
        tensors = {
            name: replace(self.tensors[name], role=role, spec=replace(self.tensors[name].spec, shape=role.shape))
            for name, role in roles(architecture).items()
        }
        copied_steps = {name: origin for name, origin in self.copied_steps.items() if name in tensors}
        return replace(self, architecture=architecture, tensors=tensors, copied_steps=copied_steps)

    def read(self, name: str, first: int, last: int, once: bool = False) -> NDArray[Any]:
        """Return rows ``first`` to ``last`` of a tensor seen as a matrix, in the dtype that its ``spec`` names."""
        tensor, pieces, begin = self.tensors[name], [], 0
        for part in tensor.parts:
            low, high = max(first - begin, 0), min(last - begin, part.rows)
            if low < high and part.tensor == ZEROS:
                pieces.append(np.zeros((high - low, tensor.spec.columns), DTYPES[tensor.spec.dtype]))
            elif low < high:
                pieces.append(self.file.read(part.tensor, low, high, once))
            begin += part.rows
        weights = pieces[0] if len(pieces) == 1 else np.concatenate(pieces)
        return self.merge(name, first, weights) if self.merge and name in self.merged else weights

    def importance(self, name: str) -> NDArray[np.float64] | None:
        """Return by how much errors in each column of a matrix count: the squared gains of the norm that it reads.

        ``[columns]``; None for a matrix that reads no norm.
        """
        norm = self.tensors[name].role.norm
        return np.square(self.read(norm, 0, 1).astype(np.float64).reshape(-1)) if norm else None


def open_checkpoint(
    path: Path,
    architecture: Architecture,
    fill_depformer_steps: bool = False,
    index: str | None = None,
    steps_stated: bool = True,
) -> Checkpoint:
    """Open a checkpoint, to be closed, and compare every name, dtype and shape with its architecture.

    index: the name of the index beside ``path`` where the weights are in shards. fill_depformer_steps: copy steps 0-7
    of a base Moshi, which has 8, to 8-15 as the reference's loader does. steps_stated: whether config.json gives the
    number of steps; where it does not, 8 are taken as they are. Raises UserError that lists all unknown, missing and
    wrong tensors at once; and for a checkpoint of 8 steps where more are stated.
    """
    file = open_weights(path.parent, (path.name,), index)
    try:
        steps = sum(re.fullmatch(r"depformer_in\.\d+\.weight", name) is not None for name in file.specs)
        if steps == MOSHI_STEPS and not steps_stated:
            architecture = replace(architecture, steps=steps)
        if steps != MOSHI_STEPS or (steps == architecture.steps and not fill_depformer_steps):
            tensors = _claim(file, roles(architecture))
            return Checkpoint(file, architecture, tensors, {})
        if not fill_depformer_steps:
            raise UserError(
                f"{file.path}: has {MOSHI_STEPS} depformer steps, as base Moshi does; {CONFIG} says "
                f"{architecture.steps} (dep_q)",
                Hint.FILL_DEPFORMER_STEPS,
            )
        few = _claim(file, roles(replace(architecture, steps=MOSHI_STEPS)))
        full = replace(architecture, steps=PERSONAPLEX_STEPS)
        return Checkpoint(file, full, *_fill(few, roles(full)))
    except BaseException:
        file.close()
        raise


def _claim(file: Weights, expected: dict[str, Role]) -> dict[str, Tensor]:
    """Give every tensor of the file its one role; raises UserError with all that do not fit."""
    problems = [Problem(name, "stands there twice") for name in file.doubled]
    tensors: dict[str, Tensor] = {}
    shapes: dict[str, tuple[int, ...]] = {}  # of what is stored, by name
    for name, role in expected.items():
        ways = stored_as(role)
        present = [way for way in ways if any(part in file.offsets for part in way)]
        if len(present) > 1:
            problems.append(Problem(name, f"is there twice, also as {present[1][0]}", "delete one of them"))
        way = next(iter(present), ways[0])
        shapes |= {part: (role.shape[0] // len(each), *role.shape[1:]) for each in (present or [way]) for part in each}
        dtypes = {file.specs[part].dtype for part in way if part in file.specs}
        if len(dtypes) > 1:
            problems.append(Problem(name, f"its parts are {' and '.join(sorted(dtypes))}: one dtype is needed"))
        parts = tuple(TensorRows(part, Spec(part, "", shapes[part]).rows) for part in way)
        tensors[name] = Tensor(role, Spec(name, min(dtypes, default=""), role.shape), parts)
    problems += [Problem(part, "missing") for part in shapes if part not in file.offsets]
    for name in file.offsets:
        dtype = file.unknown.get(name) or file.specs[name].dtype
        if name not in shapes:
            problems.append(Problem(name, "unknown, no part of this architecture claims it"))
        elif dtype not in FLOATS:
            problems.append(Problem(name, f"dtype {dtype}, where one of {', '.join(FLOATS)} is needed"))
        elif file.specs[name].shape != shapes[name]:
            both = [list(shape) for shape in (file.specs[name].shape, shapes[name])]
            problems.append(Problem(name, f"shape {both[0]}, where config.json makes it {both[1]}"))
    if problems:
        message = f"{len(problems)} tensors do not fit the architecture"
        why = "(config.json's, or PersonaPlex-7B's where it gives no dim)"
        problems.insert(0, Problem(str(file.path), f"{message} {why}"))
    refuse(problems)
    return tensors


def _fill(few: dict[str, Tensor], expected: dict[str, Role]) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Make 16 depformer steps of 8: return the tensors, and what each filled one was copied from.

    The reference copies index i to i + 8. Embedding 7 (of step 8) has no counterpart among the 7 that base Moshi
    holds; the reference leaves it as it was initialized, we write zeros.
    """
    tensors, copied_steps = {}, {}
    for name, role in expected.items():
        if name in few and few[name].role.stacked == role.stacked:
            tensors[name] = few[name]
            continue
        if name in few:
            origin = few[name]
            parts = origin.parts * (role.stacked // origin.role.stacked)
            copied_steps[name] = f"{name}: its {MOSHI_STEPS} steps, twice"
        else:
            index = r"(gating|linears|depformer_in|depformer_emb)\.(\d+)\."
            copied = re.sub(index, lambda match: f"{match[1]}.{int(match[2]) - MOSHI_STEPS}.", name)
            origin = few.get(copied, few["depformer_emb.0.weight"])
            parts = (TensorRows(copied if copied in few else ZEROS, origin.spec.rows),)
            copied_steps[name] = parts[0].tensor
        tensors[name] = Tensor(role, Spec(name, origin.spec.dtype, role.shape), parts)
    return tensors, copied_steps
