"""Where a checkpoint comes from: the Hub, a folder, or the demo that the toolkit makes itself."""

import os
import re
from collections.abc import Iterable, Mapping
from contextlib import ExitStack, closing
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Self

from ..errors import Problem, UserError, check_name, refuse
from ..file_names import CARD, CODEC, CONFIG, FILES, MANIFEST, TOKENIZER, VOICES, WEIGHTS
from ..progress import byte_bar
from ..tensorfile import TensorFile
from . import demo, hub
from .architecture import Architecture, impossible, read_config, sizes_of
from .checkpoint import Checkpoint, open_checkpoint
from .license import NVIDIA, OWN, License, license_of
from .recorded_voice import RecordedVoice, check_voice_name
from .scan import Fingerprint, hash_file, scan_tensors
from .tokenizer import open_tokenizer
from .voices import Voice, read_voices

DEFAULT = "nvidia/personaplex-7b-v1"
HUB_ID = re.compile(r"(?!.*(?:--|\.\.))[A-Za-z0-9][\w.-]{0,95}/[\w.-]{1,96}")  # USER/NAME


@dataclass(frozen=True)
class Location:
    """A source's files on this machine. revision: the commit on the Hub, None for a folder."""

    identity: str
    folder: Path
    revision: str | None = None

    @property
    def license(self) -> License | None:
        """The license that the source's card states; of the demo and of PersonaPlex itself also without one."""
        known = {DEFAULT: NVIDIA, **dict.fromkeys(demo.SIZES, OWN)}
        return license_of(self.folder) or known.get(self.identity)


@dataclass(frozen=True)
class AdapterRecord:
    """A LoRA adapter that was merged into a source.

    id: its Hub id or file name. revision: the commit on the Hub, None for a file. merged: names of the tensors.
    """

    id: str
    revision: str | None
    rank: int
    scaling: float
    size: int
    sha256: str
    merged: tuple[str, ...]

    def to_json(self) -> dict[str, Any]:
        """Return it as a manifest holds it."""
        return asdict(self) | {"merged": list(self.merged)}

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Self:
        """Return the record in a manifest that was checked."""
        return cls(**{field: data[field] for field in cls.__annotations__} | {"merged": tuple(data["merged"])})


@dataclass(frozen=True)
class Source:
    """An open source, a context manager.

    others: files in its archive of voices that are not voices. adapter: the one that was merged, if any. recorded: the
    voices that were made from recordings; ``voices`` has them too.
    """

    location: Location
    checkpoint: Checkpoint
    voices: list[Voice]
    others: list[str]
    adapter: AdapterRecord | None = None
    recorded: tuple[RecordedVoice, ...] = ()

    def with_voices(self, recorded: Iterable[RecordedVoice]) -> "Source":
        """Return the source with more voices; raises UserError for names that are not plain, or are taken."""
        voices, recorded = list(self.voices), tuple(recorded)
        for one in recorded:
            check_voice_name(one.voice.name, [voice.name for voice in voices])
            voices.append(one.voice)
        ordered = sorted(voices, key=lambda voice: voice.name)
        return replace(self, voices=ordered, recorded=self.recorded + recorded)

    def close(self) -> None:
        """Close the checkpoint, and an adapter that is merged into it."""
        self.checkpoint.close()

    def check_unchanged(self, work: str) -> None:
        """Raise UserError if the weights, or an adapter, changed since they were opened; work: what was done."""
        changed = self.checkpoint.changed()
        refuse([Problem(str(path), f"changed while it was {work}", "run the command again") for path in changed])

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @property
    def architecture(self) -> Architecture:
        """The model's sizes."""
        return self.checkpoint.architecture

    @property
    def nbytes(self) -> int:
        """Bytes of all five files."""
        return sum((self.location.folder / name).stat().st_size for name in FILES)


def locate(
    source: str, revision: str | None = None, quiet: bool = False, room: hub.DiskBudget | None = None
) -> Location:
    """Find a source: a folder, a Hub id such as ``nvidia/personaplex-7b-v1``, ``demo`` or ``demo:7b``.

    Downloads what is not in the Hub's cache; makes the demo. room: where the bundle will stand, to see before a
    download whether all fits. Raises UserError if it is nowhere or not accessible.
    """
    if is_hub_id(source):
        folder, commit = hub.download(source, revision, FILES, (CARD,), room, quiet)
        return Location(source, folder, commit)
    return _local(source, quiet)


def locate_here(source: str, revision: str | None = None, quiet: bool = False) -> Location | None:
    """Find a source without the network: None for a Hub id whose files are not all in the cache.

    None as well for a demo that was not made yet.
    """
    if is_hub_id(source):
        cached = hub.cached(source, revision, FILES)
        return Location(source, *cached) if cached else None
    if source in demo.SIZES and not demo.folder_of(source).is_dir():
        return None
    return _local(source, quiet)


def is_hub_id(source: str) -> bool:
    """Tell whether a source is looked for on the Hub: it is no demo and nothing on this machine, and has its form."""
    local = source in demo.SIZES or source.startswith((".", os.sep, "~")) or Path(source).exists()
    return not local and HUB_ID.fullmatch(source) is not None


def _local(source: str, quiet: bool) -> Location:
    if source in demo.SIZES:
        folder = demo.cached(source, quiet)
        return Location(source, folder)
    try:
        folder = Path(source).expanduser()
    except RuntimeError:  # ~stranger
        folder = Path(source)
    if folder.is_dir():
        missing = [name for name in FILES if not (folder / name).is_file()]
        if missing and (folder / MANIFEST).is_file():
            raise UserError(f"{source}: is a bundle, which is made from a source: give the checkpoint it came from")
        if missing:
            raise UserError(f"{source}: {', '.join(missing)} not there; a source folder holds {', '.join(FILES)}")
        return Location(check_name(folder.resolve().name, "the folder"), folder)
    if folder.is_file():
        raise UserError(f"{source}: is a file: give the folder that holds it")
    raise UserError(
        f"{source}: neither a folder nor a Hub id: give a folder that holds {WEIGHTS}, an id such as {DEFAULT}, "
        f"or one of {', '.join(demo.SIZES)}"
    )


def open_source(
    location: Location, fill_depformer_steps: bool = False, thorough: bool = False, quiet: bool = False
) -> Source:
    """Open a source's files and check all that can be seen without reading the weights: ``with open_source(...)``.

    Raises UserError with every problem of the configuration, the checkpoint and the voices; if there are any, thorough
    reads the weights too, and adds the tensors that hold values that are not finite.
    """
    architecture = sizes_of(read_config(location.folder / CONFIG))
    problems = impossible(architecture)
    with ExitStack() as stack:
        try:
            weights = open_checkpoint(location.folder / WEIGHTS, architecture, fill_depformer_steps)
            checkpoint = stack.enter_context(weights)
        except UserError as error:
            problems += error.problems
        try:
            voices, others = read_voices(location.folder / VOICES, architecture)
        except UserError as error:
            problems += error.problems
        try:
            with closing(TensorFile(location.folder / CODEC)) as codec:
                problems += codec.header_problems()
        except UserError as error:
            problems += error.problems
        try:
            open_tokenizer(location.folder / TOKENIZER)
        except UserError as error:
            problems += error.problems
        if problems and thorough:
            problems += _not_finite(location.folder / WEIGHTS, quiet)
        refuse(problems)
        stack.pop_all()  # the caller closes it
    return Source(location, checkpoint, voices, others)


def _not_finite(weights: Path, quiet: bool) -> list[Problem]:
    """Read a checkpoint that has other problems, and return its tensors with values that are not finite."""
    try:
        with closing(TensorFile(weights)) as file, byte_bar("checking source", weights.stat().st_size, quiet) as bar:
            return _listed(scan_tensors(file, bar)[1])
    except UserError:  # not readable, which is listed already
        return []


def _listed(bad: dict[str, int]) -> list[Problem]:
    why = "this checkpoint is damaged"
    return [Problem(name, f"{count} values are NaN or infinite", why) for name, count in bad.items()]


def fingerprint(source: Source, quiet: bool = False) -> dict[str, Fingerprint]:
    """Read all of a source once: return size and sha256 of every file.

    Raises UserError that lists every tensor with values that are not finite.
    """
    with byte_bar("checking source", source.nbytes, quiet) as bar:
        of_weights, bad = scan_tensors(source.checkpoint.file, bar)
        with closing(TensorFile(source.location.folder / CODEC)) as codec:
            of_codec, bad_codec = scan_tensors(codec, bar)
        fingerprints = {WEIGHTS: of_weights, CODEC: of_codec} | {
            name: hash_file(source.location.folder / name, bar) for name in FILES if name not in (WEIGHTS, CODEC)
        }
    wrong = [
        Problem(
            str(path), "its sha256 is not the one that the Hub gave: damaged in the cache", f"delete {path.resolve()}"
        )
        for path in (source.location.folder / name for name in FILES)
        if (expected := hub.hub_sha256(path)) and fingerprints[path.name].sha256 != expected
    ]
    refuse(_listed(bad) + [problem.within(CODEC) for problem in _listed(bad_codec)] + wrong)
    return fingerprints
