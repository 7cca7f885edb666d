"""A whole sweep: its cells run here or on a cluster, and its results read together."""

import fcntl
import os
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ...calibrate.quantizer import gpus_here
from ...convert.errors import CheckFailed, UserError
from ...convert.parallel import cores
from . import local_run, page, ray_run, tables
from .cells import Cell, cells_of
from .estimate import Estimate, estimates
from .jobs import Job, jobs_of, keys_of, needed
from .place import Place, download, shown, write_text
from .progress_line import ProgressLine, kind_of
from .records import (
    RESULT,
    CellFailure,
    CellResult,
    front,
    read_failure,
    read_result,
    times_of,
    to_text,
)
from .settings import KEEP, URL, Sweep
from .sweep_file import read
from .work import Outcome, is_finished

FAILED = "failed"


@dataclass(frozen=True)
class SweepResult:
    """The results of a sweep. front: names of the cells on the Pareto front of their source. page: ``index.html``."""

    results: tuple[CellResult, ...]
    failures: tuple[CellFailure, ...]
    front: frozenset[str]
    page: Path
    parquet: bool


def sweep(
    file: str | Path,
    output: str | Path,
    *,
    ray: str | None = None,
    storage: str | None = None,
    keep: str = "none",
    quiet: bool = True,
) -> SweepResult:
    """Run the cells of a ``sweep.toml``, and write their results.

    Example::

        done = sweep("sweep.toml", "results")
        done.front

    output: a folder, which all machines see unless there is a storage. ray: address of a Ray cluster, or ``auto`` for
    the one that RAY_ADDRESS names, else a local one; None to run the cells one after another in this process. storage:
    a URL that fsspec knows, through which sources and results travel. keep: bundles to keep, ``none``, ``best`` for
    those on the Pareto front of their source, or ``all``. quiet: no progress.

    Cells that are done already stay; a changed file runs only what changed; cells that failed run again. A cell that
    fails is in ``failures`` and does not stop the rest. Raises UserError for what the user can correct.
    """
    path, folder = Path(file), Path(output)
    if keep not in KEEP:
        raise UserError(f"keep is {keep!r}: use one of {', '.join(KEEP)}")
    if storage and not URL.fullmatch(storage):
        raise UserError(f"storage {shown(storage)}: not a URL: write it like s3://bucket/folder")
    settings = read(path)
    cells = cells_of(settings)
    with _locked(folder):
        place = Place(folder.resolve(), storage)
        jobs = jobs_of(settings, cells, place, keep)
        of_cells = {job.work.key: job for job in jobs if job.cell}
        before = {key for key, job in of_cells.items() if _is_done(job, place)}
        shown_command = _command(path, output, storage, keep)
        again = _again(of_cells, before, place, keep)
        wanted, before = (set(of_cells) - before) | again, before - again
        with ray_run.cluster(ray, settings.resources) if ray and wanted else nullcontext():
            side_by_side = ray_run.slots(settings.resources) if ray and wanted else 1
            progress = _progress(of_cells, before, wanted, place, side_by_side, quiet)
            progress.start()
            for ended in _run(needed(jobs, wanted), place, settings, ray if wanted else None):
                if ended is None:
                    progress.tick()
                    continue
                progress.show(*ended)
                _record(*ended, place)
                if keep == "best" and ended[0].cell:
                    _drop(of_cells, place, ended[0].cell.source.name)
            progress.close()
        if keep == "best":
            _drop(of_cells, place)
        made = _write(of_cells, place, shown_command)
        shutil.rmtree(place.here / "work", ignore_errors=True) if not made.failures else None
    return made


def dry_run(file: str | Path) -> tuple[Sweep, list[Estimate]]:
    """Return a checked sweep, and each cell's size and time; writes and downloads nothing, and needs no Ray."""
    settings = read(Path(file))
    return settings, estimates(cells_of(settings), settings.evaluation, settings.resources.whole_gpus)


def fail_if_failed(made: SweepResult) -> None:
    """Raise CheckFailed if any cell has no result."""
    if made.failures:
        first, total = made.failures[0], len(made.results) + len(made.failures)
        raise CheckFailed(
            f"{len(made.failures)} of {total} cells failed; {first.name}: {first.error}",
            "run the same command again: it runs only what failed",
        )


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Make the results' folder, and hold it; raises UserError if another sweep does, or it is something else."""
    if folder.exists() and not folder.is_dir():
        raise UserError(f"{folder}: is a file: give a folder for the results")
    if folder.is_dir() and any(folder.iterdir()) and not (folder / ".sweep").is_file():
        raise UserError(f"{folder}: holds files that are not of a sweep: give a new or empty folder")
    folder.mkdir(parents=True, exist_ok=True)
    lock = os.open(folder / ".sweep", os.O_RDWR | os.O_CREAT, 0o600)
    try:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise UserError(f"{folder}: another sweep is at work there: wait for it, or give another folder") from None
        yield
    finally:
        os.close(lock)


def _command(path: Path, output: str | Path, storage: str | None, keep: str) -> str:
    """Return what runs a sweep again; folders above files are left out, and secrets of URLs."""
    parts = ["ppx-sweep", path.name, "--output", Path(output).name]
    parts += ["--storage", shown(storage)] if storage else []
    return " ".join([*parts, "--keep", keep] if keep != "none" else parts)


def _is_done(job: Job, place: Place) -> bool:
    return place.has(keys_of(job)[0])


def _again(jobs: dict[str, Job], before: set[str], place: Place, keep: str) -> set[str]:
    """Return cells that have a result, but not the bundle that is to be kept."""
    if keep == "none":
        return set()
    missing = {key for key in before if not is_finished(place, key, keep_bundle=True)}
    if keep == "all" or not missing:
        return missing
    on = front_of([_result(jobs[key], place) for key in before])
    return {key for key in missing if (cell := jobs[key].cell) and cell.name in on}


def front_of(results: Sequence[CellResult]) -> frozenset[str]:
    """Return the names of the cells on the Pareto front of their source."""
    sources = {one.source for one in results}
    return frozenset(name for source in sources for name in front([one for one in results if one.source == source]))


def _result(job: Job, place: Place) -> CellResult:
    """Return the result of a cell that is done; the driver gets its files first, where they are behind a URL."""
    folder = place.folder / keys_of(job)[0]
    if place.url is not None and not folder.is_dir():
        folder.parent.mkdir(parents=True, exist_ok=True)
        download(place.url, keys_of(job)[0], folder)
    result = read_result(folder / RESULT)
    if result.identity != job.identity:
        raise UserError(f"{folder / RESULT}: is of other inputs: remove its folder, and run the sweep again")
    return result


def _progress(
    jobs: dict[str, Job], before: set[str], wanted: set[str], place: Place, side_by_side: int, quiet: bool
) -> ProgressLine:
    took: dict[tuple[str, str], list[float]] = {}
    for key in sorted(before):
        cell = jobs[key].cell
        if cell:
            took.setdefault(kind_of(cell), []).append(_result(jobs[key], place).times.seconds)
    left = {key: kind_of(job.cell) for key, job in jobs.items() if key in wanted and job.cell}
    return ProgressLine(left, len(before), took, side_by_side, quiet)


def _run(jobs: Sequence[Job], place: Place, settings: Sweep, ray: str | None) -> Iterator[tuple[Job, Outcome] | None]:
    if ray:
        return ray_run.run_on_ray(jobs, place, settings.resources)
    gpus = settings.resources.gpus
    gpus = min(gpus, max(1, gpus_here())) if gpus > 1 else gpus
    here = replace(settings.resources, cores=min(settings.resources.cores, cores()), gpus=gpus)
    return local_run.run_here(jobs, place, here)


def _record(job: Job, outcome: Outcome, place: Place) -> None:
    """Write down why a cell failed, or forget that it did; a result is where the cell has put it."""
    if job.cell is None:
        return
    file = _failure_file(job, place)
    if outcome.error is None:
        file.unlink(missing_ok=True)
        return
    failure = CellFailure(job.cell.name, job.identity, outcome.error, times_of(outcome.seconds))
    write_text(file, to_text(failure))


def _failure_file(job: Job, place: Place) -> Path:
    return place.folder / FAILED / f"{job.work.key}.json"


def _drop(jobs: dict[str, Job], place: Place, source: str | None = None) -> None:
    """Remove bundles that are not on the front of their source, of what is known so far."""
    there = [
        job for job in jobs.values() if job.cell and source in (None, job.cell.source.name) and _is_done(job, place)
    ]
    on = front_of([_result(job, place) for job in there])
    for job in there:
        if job.cell and job.cell.name not in on and place.has(keys_of(job)[1]):
            place.remove(keys_of(job)[1])


def _write(jobs: dict[str, Job], place: Place, command: str) -> SweepResult:
    """Write tables and page of the cells that a sweep has now."""
    results, failures = [], []
    reports: dict[str, str] = {}
    bundles: dict[str, str] = {}
    for job in jobs.values():
        cell: Cell | None = job.cell
        if cell and _is_done(job, place):
            results.append(_result(job, place))
            key, bundle = keys_of(job)
            reports[cell.name] = f"{key}/parity/report.html"
            if place.has(bundle):
                bundles[cell.name] = bundle if place.url is None else f"{shown(place.url)}/{bundle}"
        elif cell:
            with suppress(FileNotFoundError):
                failures.append(read_failure(_failure_file(job, place)))
    on = front_of(results)
    rows: list[dict[str, Any]] = tables.rows_of(results, failures, set(on), reports, bundles)
    tables.write_csv(rows, place.folder / tables.CSV)
    parquet = tables.write_parquet(rows, place.folder / tables.PARQUET)
    index = place.folder / page.INDEX
    write_text(index, page.html(rows, command))
    return SweepResult(tuple(results), tuple(failures), on, index, parquet)
