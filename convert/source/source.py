"""Where a checkpoint comes from: the Hub, a folder, or the demo that the toolkit makes itself."""

import os
import re
from collections.abc import Callable, Iterable, Sequence
from contextlib import ExitStack, closing
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Self

from ..errors import Problem, UserError, check_name, refuse
from ..file_names import CARD, CODEC, CONFIG, MANIFEST, TOKENIZER, VOICES, WEIGHTS
from ..progress import byte_bar
from ..regular_files import read_json
from ..tensorfile import TensorFile
from . import demo, hub
from .adapter_record import AdapterRecord
from .architecture import Architecture, impossible, read_config, sizes_of
from .checkpoint import Checkpoint, open_checkpoint
from .license import NVIDIA, OWN, License, license_of
from .recorded_voice import RecordedVoice, check_voice_name
from .scan import Fingerprint, hash_file, scan_tensors
from .shards import files_of, open_weights
from .source_files import NAMING, SourceFiles, files_in, missing_files, name_files
from .tokenizer import open_tokenizer
from .voices import Voice, read_voices

DEFAULT = "nvidia/personaplex-7b-v1"
_LARGEST_MANIFEST = 64 << 20  # bytes
HUB_ID = re.compile(r"(?!.*(?:--|\.\.))[A-Za-z0-9][\w.-]{0,95}/[\w.-]{1,96}")  # USER/NAME
HUB_FILES = hub.Choice(NAMING, lambda folder, available: name_files(folder, available).names)


@dataclass(frozen=True)
class Location:
    """A source's files on this machine. revision: the commit on the Hub, None for a folder."""

    identity: str
    folder: Path
    revision: str | None = None

    @cached_property
    def files(self) -> SourceFiles:
        """The names of its files."""
        return files_in(self.folder)

    @property
    def codec(self) -> Path:
        """The file of Mimi's weights."""
        return self.folder / self.files.codec

    @property
    def tokenizer(self) -> Path:
        """The sentencepiece model."""
        return self.folder / self.files.tokenizer

    @property
    def voices(self) -> Path | None:
        """The archive of voices, None for a source without voices."""
        return self.folder / self.files.voices if self.files.voices else None

    def architecture(self) -> tuple[Architecture, bool]:
        """Return the sizes that config.json gives, each looked at alone, and whether it gives any.

        PersonaPlex-7B's, which are Moshi's too but for the number of depformer steps, where it gives none.
        """
        config = read_config(self.folder / CONFIG) if self.files.config else {}
        return sizes_of(config), "dim" in config

    @property
    def license(self) -> License | None:
        """The license that the source's card states; of the demo and of PersonaPlex itself also without one."""
        known = {DEFAULT: NVIDIA, **dict.fromkeys(demo.SIZES, OWN)}
        return license_of(self.folder) or known.get(self.identity)


@dataclass(frozen=True)
class Source:
    """An open source, a context manager.

    others: files in its archive of voices that are not voices. adapter: the one that was merged, if any. recorded: the
    voices that were made from recordings; ``voices`` has them too, behind the source's own.
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
        return replace(self, voices=voices, recorded=self.recorded + recorded)

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
        """Bytes of all files."""
        return sum((self.location.folder / name).stat().st_size for name in self.location.files.names)


def locate(
    source: str,
    revision: str | None = None,
    quiet: bool = False,
    room: hub.DiskBudget | None = None,
    check: Callable[[Location], None] | None = None,
) -> Location:
    """Find a source: a folder, a Hub id such as ``nvidia/personaplex-7b-v1``, ``demo`` or ``demo:7b``.

    Downloads what is not in the Hub's cache; makes the demo. room: where the bundle will stand, to see before a
    download whether all fits. check: raises UserError for a source on the Hub that is not wanted, of which only
    config.json and an index are there yet. Raises UserError if it is nowhere or not accessible.
    """
    if is_hub_id(source):
        optional = (CARD, VOICES, CONFIG)
        choice = _checked(source, check) if check else HUB_FILES
        folder, commit = hub.download(source, revision, _required(source), optional, room, quiet, choice)
        return Location(source, folder, commit)
    return _local(source, quiet)


def locate_here(source: str, revision: str | None = None, quiet: bool = False) -> Location | None:
    """Find a source without the network: None for a Hub id whose files are not all in the cache.

    None as well for a demo that was not made yet.
    """
    if is_hub_id(source):
        cached = hub.cached(source, revision, _required(source), HUB_FILES)
        return Location(source, *cached) if cached else None
    if source in demo.SIZES and not demo.folder_of(source).is_dir():
        return None
    return _local(source, quiet)


def _checked(source: str, check: Callable[[Location], None]) -> hub.Choice:
    """Return the choice of a source's files that looks at its config.json first."""

    def choose(folder: Path, available: Callable[[str], bool]) -> Sequence[str]:
        names = name_files(folder, available).names
        check(Location(source, folder))
        return names

    return hub.Choice(NAMING, choose)


def _required(source: str) -> tuple[str, ...]:
    """Return files that a repository must have beside those that every source has."""
    return (VOICES, CONFIG) if source == DEFAULT else ()


def anywhere(source: str) -> str:
    """Return a source as a command for any machine names it: ``path/to/NAME`` for what is local."""
    return source if source in demo.SIZES or is_hub_id(source) else f"path/to/{Path(source).name}"


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
    except RuntimeError:  # ~user who does not exist
        folder = Path(source)
    if folder.is_dir():
        if _is_bundle(folder):
            raise UserError(f"{source}: is a bundle, which is made from a source: give the checkpoint it came from")
        if missing := missing_files(folder, files_in(folder)):
            holds = f"{WEIGHTS} (or shards and their index), {CODEC}, {TOKENIZER}, and mostly {CONFIG} and {VOICES}"
            raise UserError(f"{source}: {', '.join(missing)} not there; a source folder holds {holds}")
        return Location(check_name(folder.resolve().name, "the folder"), folder)
    if folder.is_file():
        raise UserError(f"{source}: is a file: give the folder that holds it")
    raise UserError(
        f"{source}: neither a folder nor a Hub id: give a folder that holds {WEIGHTS}, an id such as {DEFAULT}, "
        f"or one of {', '.join(demo.SIZES)}"
    )


def _is_bundle(folder: Path) -> bool:
    try:
        return "manifest_version" in read_json(folder / MANIFEST, _LARGEST_MANIFEST)
    except (UserError, ValueError, TypeError, RecursionError):
        return False


def open_source(
    location: Location, fill_depformer_steps: bool = False, thorough: bool = False, quiet: bool = False
) -> Source:
    """Open a source's files and check all that can be seen without reading the weights: ``with open_source(...)``.

    Raises UserError with every problem of the configuration, the checkpoint and the voices; if there are any, thorough
    reads the weights too, and adds the tensors that hold values that are not finite.
    """
    architecture, stated = location.architecture()
    files, problems = location.files, impossible(architecture)
    voices: list[Voice] = []
    others: list[str] = []
    with ExitStack() as stack:
        try:
            path = location.folder / files.weights[0]
            opened = open_checkpoint(path, architecture, fill_depformer_steps, files.index, stated)
            checkpoint = stack.enter_context(opened)
        except UserError as error:
            problems += error.problems
        try:
            if location.voices:
                voices, others = read_voices(location.voices, architecture)
        except UserError as error:
            problems += error.problems
        try:
            with closing(TensorFile(location.codec)) as codec:
                problems += codec.header_problems()
        except UserError as error:
            problems += error.problems
        try:
            open_tokenizer(location.tokenizer)
        except UserError as error:
            problems += error.problems
        if problems and thorough:
            problems += _not_finite(location, quiet)
        refuse(problems)
        stack.pop_all()  # the caller closes it
    return Source(location, checkpoint, voices, others)


def _not_finite(location: Location, quiet: bool) -> list[Problem]:
    """Read a checkpoint that has other problems, and return its tensors with values that are not finite."""
    files = location.files
    try:
        with (
            closing(open_weights(location.folder, files.weights, files.index)) as weights,
            byte_bar("checking source", weights.nbytes, quiet) as bar,
        ):
            return [problem for file in files_of(weights) for problem in _listed(scan_tensors(file, bar)[1])]
    except UserError:  # not readable, which is listed already
        return []


def _listed(bad: dict[str, int]) -> list[Problem]:
    why = "this checkpoint is damaged"
    return [Problem(name, f"{count} values are NaN or infinite", why) for name, count in bad.items()]


def fingerprint(source: Source, quiet: bool = False) -> dict[str, Fingerprint]:
    """Read all of a source once: return size and sha256 of every file.

    Raises UserError that lists every tensor with values that are not finite.
    """
    location, names = source.location, source.location.files.names
    bad: dict[str, int] = {}
    with byte_bar("checking source", source.nbytes, quiet) as bar:
        fingerprints = {}
        for file in files_of(source.checkpoint.file):
            fingerprints[file.path.name], bad_here = scan_tensors(file, bar)
            bad |= bad_here
        with closing(TensorFile(location.codec)) as codec:
            fingerprints[codec.path.name], bad_codec = scan_tensors(codec, bar)
        fingerprints |= {n: hash_file(location.folder / n, bar) for n in names if n not in fingerprints}
    wrong = [
        Problem(
            str(path), "its sha256 is not the one that the Hub gave: damaged in the cache", f"delete {path.resolve()}"
        )
        for path in (location.folder / name for name in names)
        if (expected := hub.hub_sha256(path)) and fingerprints[path.name].sha256 != expected
    ]
    refuse(_listed(bad) + [problem.within(location.files.codec) for problem in _listed(bad_codec)] + wrong)
    return fingerprints
