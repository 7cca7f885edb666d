"""From a sweep to pieces of work: sources and files as workers find them, and what depends on what."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory

from tqdm import tqdm

from ...convert.errors import Problem, UserError
from ...convert.file_names import CARD
from ...convert.source import demo
from ...convert.source.adapter_settings import SIDE_FILES
from ...convert.source.scan import hash_file
from ...convert.source.source import is_hub_id, locate
from .cells import Cell, digest, evaluation_identity, folder_of, identity
from .place import Place, source_fingerprint
from .settings import CalibrationSet, Sweep, SweepSource
from .work import (
    BUNDLES,
    CELLS,
    SENSITIVITIES,
    TOKENS,
    CellWork,
    FileReference,
    SensitivityWork,
    SourceReference,
    TokensWork,
    Work,
)

SHARED = "shared"


@dataclass(frozen=True)
class Job:
    """A piece of work. cell: None for what cells share. needs: keys of work that is done before."""

    work: Work
    cell: Cell | None
    identity: str
    needs: tuple[str, ...] = ()

    @property
    def label(self) -> str:
        """What people read of it."""
        return self.cell.name if self.cell else self.work.key.removeprefix(f"{SHARED}/").rpartition(".")[0]


@dataclass(frozen=True)
class _Inputs:
    """Sources and files as workers find them, each looked at once."""

    place: Place
    sources: dict[str, tuple[SourceReference, str]]
    files: dict[Path, tuple[FileReference, str]]

    def file(self, path: Path) -> tuple[FileReference, str]:
        if path not in self.files:
            sha256 = _sha256(path)
            reference = FileReference(str(path.resolve()))
            if self.place.url is not None:
                reference = FileReference(path.name, f"inputs/{sha256}")
                _deliver(self.place, [path], f"inputs/{sha256}")
            self.files[path] = reference, sha256
        return self.files[path]

    def source(self, source: SweepSource) -> tuple[SourceReference, str]:
        if source.name not in self.sources:
            self.sources[source.name] = source_reference(source, self.place)
        return self.sources[source.name]


def jobs_of(sweep: Sweep, cells: Sequence[Cell], place: Place, keep: str) -> list[Job]:
    """Return the work of a sweep, in an order in which it can be done.

    Reads every source and file once, for its sha256; copies what is on this machine behind the place's URL, if it has
    one. Raises UserError that lists what is wrong with the sources.
    """
    inputs, problems = _Inputs(place, {}, {}), list[str | Problem]()
    for one in dict.fromkeys(cell.source for cell in cells):
        try:
            inputs.source(one)
        except UserError as error:
            problems += [problem.within(f"source {one.name}") for problem in error.problems]
    if problems:
        raise UserError(problems)
    asked = sweep.evaluation
    evaluation = inputs.file(asked.tokens) if asked.tokens else None
    evaluated = evaluation_identity(asked, evaluation[1] if evaluation else None)
    shared: dict[str, Job] = {}
    jobs = []
    for cell in cells:
        source, mark = inputs.source(cell.source)
        tokens = measured = None
        if cell.calibration:
            tokens = _tokens(cell.source.name, source, mark, cell.calibration, inputs)
            shared.setdefault(tokens.work.key, tokens)
            if cell.needs_sensitivities:
                measured = _sensitivities(cell.source.name, cell.calibration.name, source, tokens)
                shared.setdefault(measured.work.key, measured)
        stands_for = identity(cell, mark, tokens.identity if tokens else None, evaluated)
        names = {"name": cell.name, "identity": stands_for, "source": cell.source.name, "recipe": cell.recipe.name}
        names |= {"method": cell.method_names, "calibration": cell.calibration.name if cell.calibration else ""}
        work = CellWork(
            key=folder_of(cell.name, stands_for),
            source=source,
            recipe=cell.quantized,
            request=cell.request,
            calibration=FileReference(TOKENS, tokens.work.key) if tokens else None,
            sensitivities=FileReference(SENSITIVITIES, measured.work.key) if measured else None,
            evaluation=replace(asked, tokens=None),
            evaluation_tokens=evaluation[0] if evaluation else None,
            names=names,
            keep_bundle=keep != "none",
        )
        needs = tuple(job.work.key for job in (tokens, measured) if job)
        jobs.append(Job(work, cell, stands_for, needs))
    # Tokens come before the sensitivities that are measured on them: `shared` keeps the order in which they were added.
    return [*shared.values(), *jobs]


def needed(jobs: Sequence[Job], wanted: set[str]) -> list[Job]:
    """Return the jobs of some cells, by their keys, and what these depend on."""
    needs = {need for job in jobs if job.work.key in wanted for need in job.needs}
    return [job for job in jobs if job.work.key in wanted or (job.cell is None and job.work.key in needs)]


def _tokens(name: str, source: SourceReference, mark: str, calibration: CalibrationSet, inputs: _Inputs) -> Job:
    tokens, audio = ([inputs.file(path) for path in paths] for paths in (calibration.tokens, calibration.audio))
    recorded = [[sha256 for _, sha256 in files] for files in (tokens, audio)]
    # Tokens depend on the source only where it generates or encodes them, but are checked against its vocabulary.
    stands_for = digest("tokens", mark, recorded, calibration.sessions, calibration.frames)
    key = folder_of(f"{SHARED}/{name}/{calibration.name}", stands_for)
    settings = replace(calibration, tokens=(), audio=())
    references = (tuple(reference for reference, _ in files) for files in (tokens, audio))
    return Job(TokensWork(key, source, settings, *references), None, stands_for)


def _sensitivities(name: str, calibration: str, source: SourceReference, tokens: Job) -> Job:
    stands_for = digest("sensitivities", tokens.identity)
    key = folder_of(f"{SHARED}/{name}/{calibration}-sensitivities", stands_for)
    file = FileReference(TOKENS, tokens.work.key)
    return Job(SensitivityWork(key, source, file), None, stands_for, (tokens.work.key,))


def source_reference(source: SweepSource, place: Place) -> tuple[SourceReference, str]:
    """Return a source as workers find it, and what stands for its content."""
    adapter, of_adapter = source.adapter, source.adapter
    if adapter and Path(adapter).exists():
        if place.url is not None:
            raise UserError(f"{adapter}: an adapter does not travel through a storage URL: name one on the Hub")
        files = sorted(path for path in Path(adapter).rglob("*") if path.is_file()) or _with_side_files(Path(adapter))
        adapter, of_adapter = str(Path(adapter).resolve()), " ".join(map(_sha256, files))
    settings = (adapter, source.fill_depformer_steps)
    decisive = [of_adapter, source.fill_depformer_steps]
    if source.is_url:
        stands_for = digest("source", source_fingerprint(source.where), *decisive)
        return SourceReference(source.where, None, *settings, copy=f"{stands_for[:32]}/{source.name}"), stands_for
    location = locate(source.where, source.revision, quiet=True)
    if location.revision:
        stands_for = digest("source", source.where, location.revision, *decisive)
        return SourceReference(source.where, location.revision, *settings), stands_for
    there = [location.folder / name for name in (*location.files.names, CARD) if (location.folder / name).is_file()]
    stands_for = digest("source", [(path.name, _sha256(path)) for path in there], *decisive)
    if place.url is None:
        where = source.where if source.where in demo.SIZES else str(location.folder.resolve())
        return SourceReference(where, None, *settings), stands_for
    copy = f"{stands_for[:32]}/{location.identity.replace(':', '-')}"
    _deliver(place, there, f"sources/{copy}")
    return SourceReference("", None, *settings, copy=copy), stands_for


def _with_side_files(adapter: Path) -> list[Path]:
    """Return an adapter's file, and those beside it that may give its rank and scaling."""
    return [adapter, *(path for name in SIDE_FILES if (path := adapter.with_name(name)).is_file())]


@contextmanager
def _folder_of(paths: Sequence[Path]) -> Iterator[Path]:
    """Make a folder of links to files."""
    with TemporaryDirectory(prefix="ppx-sweep-") as temporary:
        folder = Path(temporary, "files")
        folder.mkdir()
        for path in paths:
            (folder / path.name).symlink_to(path.resolve())
        yield folder


def _deliver(place: Place, paths: Sequence[Path], key: str) -> None:
    """Copy files behind the place's URL, where they are not there yet."""
    if not place.has(key):
        with _folder_of(paths) as folder:
            place.deliver(folder, key)


def _sha256(path: Path) -> str:
    with tqdm(disable=True) as silent:
        return hash_file(path, silent).sha256


def source_is_remote(source: SweepSource) -> bool:
    """Tell whether a source is not on this machine's disks."""
    return source.is_url or is_hub_id(source.where)


def keys_of(job: Job) -> tuple[str, str]:
    """Return where the result and the bundle of a cell are kept."""
    return f"{CELLS}/{job.work.key}", f"{BUNDLES}/{job.work.key}"
