"""A LoRA adapter of moshi-finetune, merged into the weights while they are read: W + scaling · B · A."""

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..errors import Problem, UserError, check_name, refuse
from ..progress import byte_bar
from ..tensorfile import FLOATS, TensorFile
from . import hub
from .adapter_record import AdapterRecord
from .adapter_settings import RANK, SCALING, SIDE_FILES, AdapterSettings, read_settings
from .architecture import Architecture
from .scan import Fingerprint, scan_tensors
from .source import is_hub_id
from .tensors import Role, roles

WEIGHTS = "lora.safetensors"
FILES = (WEIGHTS, "adapter_model.safetensors", "adapters.safetensors")  # moshi-finetune's, PEFT's, mlx-lm's
_PEFT = "base_model.model."  # in front of all of PEFT's names
_KEY = re.compile(r"(?P<stem>.+?)\.lora_(?P<side>[ABab])(?:\.default)?(?:\.weight)?")
_OTHER = {"A": "B", "B": "A", "a": "b", "b": "a"}
_STACKED = re.compile(r"(.+\.self_attn)\.(in|out)_projs\.(\d{1,3})")


_FILE = hub.Choice((), lambda _, available: [next((name for name in FILES if available(name)), WEIGHTS)])


@dataclass(frozen=True)
class LoraPair:
    """What is added to rows of a tensor. first, rows: where. a, b: matrices, and their rows from which on it is.

    Of a it is ``[rank, in]``, of b ``[rows, rank]``. transposed: a is stored as ``[in, rank]``, b as ``[rank, rows]``,
    as mlx-lm does.
    """

    first: int
    rows: int
    a: tuple[str, int]
    b: tuple[str, int]
    transposed: bool = False


@dataclass(frozen=True)
class Adapter:
    """An open adapter, whose file is to be closed. pieces: by name of the checkpoint's tensor."""

    identity: str
    revision: str | None
    fingerprint: Fingerprint
    rank: int
    scaling: float
    file: TensorFile
    pieces: dict[str, tuple[LoraPair, ...]]

    def merged(self, name: str, first: int, weights: NDArray[Any]) -> NDArray[Any]:
        """Return rows of a tensor, from ``first`` on, with what the adapter adds to them, as float32.

        Summed in float64, so that how rows are taken together does not show.
        """
        total = weights.astype(np.float64)
        for piece in self.pieces[name]:
            low, high = max(first, piece.first), min(first + len(weights), piece.first + piece.rows)
            if low < high:
                (a_name, a_first), (b_name, b_first) = piece.a, piece.b
                shift = b_first - piece.first
                if piece.transposed:
                    a = self._whole(a_name).T
                    b = self._whole(b_name).T[low + shift : high + shift]
                else:
                    a = self.file.read(a_name, a_first, a_first + self.rank).astype(np.float64)
                    b = self.file.read(b_name, low + shift, high + shift).astype(np.float64)
                total[low - first : high - first] += self.scaling * (b @ a)
        return total.astype(np.float32)

    def _whole(self, name: str) -> NDArray[np.float64]:
        return self.file.read(name, 0, self.file.specs[name].rows).astype(np.float64)

    def record(self) -> AdapterRecord:
        """Return what a manifest records of it."""
        return AdapterRecord(
            self.identity,
            self.revision,
            self.rank,
            self.scaling,
            self.fingerprint.size,
            self.fingerprint.sha256,
            tuple(sorted(self.pieces)),
        )


def on_hub(where: str) -> bool:
    """Tell whether an adapter is looked for on the Hub: it has the form ``USER/NAME`` or ``USER/NAME@REVISION``."""
    return not Path(where).exists() and is_hub_id(where.partition("@")[0])


def named(where: str) -> str:
    """Return what a command that others see calls an adapter: its Hub id, or its file's name."""
    return where if on_hub(where) else Path(where).name


def open_adapter(where: str, architecture: Architecture, quiet: bool = False) -> Adapter:
    """Find and open an adapter: a file, a folder that holds one of FILES, or a Hub id (with ``@REVISION``).

    Rank and scaling come from a side file (``read_settings``), where there is one; without one they are
    moshi-finetune's for names as it writes them. Raises UserError where nothing gives them, with every key that matches
    nothing in this architecture, and with every shape that does not fit.
    """
    path, identity, revision = locate(where, quiet)
    settings = read_settings(path.parent)
    file = TensorFile(path)
    try:
        rank, scaling = _completed(settings, file)
        pieces = _claim(file, architecture, rank)
        with byte_bar("checking adapter", path.stat().st_size, quiet) as bar:
            fingerprint, bad = scan_tensors(file, bar)
        expected = hub.hub_sha256(path)
        if expected and expected != fingerprint.sha256:
            raise UserError(f"{path}: its sha256 is not the one that the Hub gave: damaged in the cache: delete it")
        why = "values are NaN or infinite: it is damaged"
        refuse([Problem(f"{path}: {name}", f"{count} {why}") for name, count in bad.items()])
    except BaseException:
        file.close()
        raise
    return Adapter(identity, revision, fingerprint, rank, scaling, file, pieces)


def locate(where: str, quiet: bool = False) -> tuple[Path, str, str | None]:
    """Find an adapter, and download it where it is on the Hub: return its file, what it is called, and the commit.

    Raises UserError if it is nowhere.
    """
    if on_hub(where):
        repository, _, revision = where.partition("@")
        folder, commit = hub.download(repository, revision or None, (), SIDE_FILES, quiet=quiet, choice=_FILE)
        return folder / _FILE.of(folder)[0], repository, commit
    try:
        path = Path(where).expanduser()
    except RuntimeError:  # ~somebody
        path = Path(where)
    chosen = _FILE.of(path)[0]
    identity = f"{path.resolve().name}/{chosen}" if path.is_dir() else path.name
    path = path / chosen if path.is_dir() else path
    if not path.is_file():
        raise UserError(f"{path}: no such file: give a {WEIGHTS}, the folder that holds it, or a Hub id")
    return path, check_name(identity, "the adapter"), None


def _completed(settings: AdapterSettings, file: TensorFile) -> tuple[int, float]:
    """Return rank and scaling, as moshi-finetune has them where no side file gives them.

    Raises UserError for an adapter with other names, whose trainer's defaults are not known.
    """
    names = [match for name in file.offsets if (match := _KEY.fullmatch(name))]
    foreign = _prefix(file) or any(match["side"] in "ab" for match in names)
    if foreign and (settings.scaling is None or settings.rank is None):
        which = "a scaling" if settings.rank else "rank and scaling"
        listed = ", ".join(SIDE_FILES)
        raise UserError(f"{file.path}: {which} is not known: put a side file with rank and alpha beside it ({listed})")
    return settings.rank or RANK, SCALING if settings.scaling is None else settings.scaling


def _prefix(file: TensorFile) -> str:
    """Return what stands in front of every name that is not a part of the layer's."""
    return _PEFT if file.offsets and all(name.startswith(_PEFT) for name in file.offsets) else ""


def _claim(file: TensorFile, architecture: Architecture, rank: int) -> dict[str, tuple[LoraPair, ...]]:
    """Give every pair of matrices its rows in the checkpoint; raises UserError with all that do not fit."""
    known = roles(architecture)
    problems = [Problem(name, "stands there twice") for name in file.doubled]
    prefix = _prefix(file)
    stems: dict[str, dict[str, str]] = {}  # of each layer, the names of its matrices by side
    for name in file.offsets:
        match = _KEY.fullmatch(name.removeprefix(prefix))
        if not match or name in file.unknown or file.specs[name].dtype not in FLOATS:
            why = "not a matrix of a LoRA (its names end in lora_A.weight and lora_B.weight, or lora_a and lora_b)"
            problems.append(Problem(name, why))
        elif match["side"].upper() in (sides := stems.setdefault(match["stem"], {})):
            problems.append(Problem(name, f"the same matrix as {sides[match['side'].upper()]}"))
        else:
            sides[match["side"].upper()] = name
    pieces: dict[str, list[LoraPair]] = {}
    for stem, sides in stems.items():
        place = _place(stem, known)
        if place is None:
            problems.append(Problem(stem, "matches no linear layer of this architecture"))
            continue
        if len(sides) == 1:
            (other,) = sides.values()
            problems.append(Problem(re.sub(r"(?<=\.lora_)[ABab]", lambda one: _OTHER[one[0]], other), "missing"))
            continue
        name, first, rows = place
        whole = known[name].stacked if rows == known[name].shape[0] else 1  # steps that lie in these two matrices
        a, b = sides["A"], sides["B"]
        expected = {a: (whole * rank, known[name].shape[1]), b: (rows, rank)}
        actual = {key: file.specs[key].shape for key in expected}
        # lower case is mlx-lm's, stored the other way round, and also others'
        transposed = whole == 1 and actual != expected and all(actual[key] == expected[key][::-1] for key in expected)
        for key, shape in expected.items():
            if actual[key] != shape and not transposed:
                shapes = f"{list(actual[key])}, where rank {rank} makes it {list(shape)}"
                why = f"(the rank is lora_rank in config.json beside it, else {RANK})"
                problems.append(Problem(key, f"shape {shapes} {why}"))
        if any(first < other.first + other.rows and other.first < first + rows for other in pieces.get(name, ())):
            problems.append(Problem(stem, "another matrix of the adapter is for the same rows"))
        height = rows // whole
        pieces.setdefault(name, []).extend(
            LoraPair(first + step * height, height, (a, step * rank), (b, step * height), transposed)
            for step in range(whole)
        )
    if not stems and not problems:
        problems.append(Problem("", "has no matrices"))
    refuse([problem.within(str(file.path)) for problem in problems])
    return {name: tuple(parts) for name, parts in pieces.items()}


def _place(stem: str, known: dict[str, Role]) -> tuple[str, int, int] | None:
    """Return the tensor that a layer's name means, and its rows: first and how many.

    Attention's projections are one tensor a layer in the checkpoint, and its steps lie one after another; newer code
    keeps them apart, under ``in_projs.N`` and ``out_projs.N``.
    """
    if match := _STACKED.fullmatch(stem):
        name = f"{match[1]}.{'in_proj_weight' if match[2] == 'in' else 'out_proj.weight'}"
        step = int(match[3])
        if name not in known or step >= known[name].stacked:
            return None
        return name, step * known[name].height, known[name].height
    for name in (f"{stem}.weight", f"{stem}_weight"):
        if name in known and known[name].kind == "linear":
            return name, 0, known[name].shape[0]
    return None
