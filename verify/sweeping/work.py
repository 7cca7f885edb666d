"""One piece of a sweep's work: calibration tokens, sensitivities, or a cell. Runs in any process, on any machine."""

import os
import shutil
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from ...calibrate.allocation import AllocationRequest, best_recipe
from ...calibrate.calibration import calibrate
from ...calibrate.quantizer import quantizer_for
from ...calibrate.size_budget import sensitivities
from ...convert.bundle.recipe import Recipe
from ...convert.bundle.recipe_file import to_toml
from ...convert.conversion import open_conversion
from ...convert.file_names import MANIFEST
from ...convert.preparation import inventory, open_named
from ...convert.source.source import fingerprint
from ..bundle_report import verify
from ..options import VerifyOptions
from ..report import FOLDER
from .place import Place, fetch_source, write_text
from .records import RESULT, CellResult, error_of, read_result, result_of, times_since, to_text
from .settings import CalibrationSet, Evaluation, Resources

TOKENS, SENSITIVITIES, RECIPE = "tokens.safetensors", "sensitivity.json", "recipe.toml"
CELLS, BUNDLES = "cells", "bundles"


@dataclass(frozen=True)
class SourceReference:
    """A source as workers find it. where: a Hub id, folder, demo or URL; copy: the name of a copy of a URL's files."""

    where: str
    revision: str | None
    adapter: str | None
    fill_depformer_steps: bool
    copy: str | None = None


@dataclass(frozen=True)
class FileReference:
    """A file as workers find it: a path that all machines see, or the key of the folder that holds it."""

    path: str
    key: str | None = None

    def open(self, place: Place) -> Path:
        """Return the file's path on this machine."""
        return Path(self.path) if self.key is None else place.fetch(self.key) / self.path


@dataclass(frozen=True)
class TokensWork:
    """Make a calibration set for a source."""

    key: str
    source: SourceReference
    calibration: CalibrationSet
    tokens: tuple[FileReference, ...]
    audio: tuple[FileReference, ...]


@dataclass(frozen=True)
class SensitivityWork:
    """Measure a source's sensitivities on calibration tokens."""

    key: str
    source: SourceReference
    tokens: FileReference


@dataclass(frozen=True)
class CellWork:
    """Convert, verify, keep the report. names: what its result records. calibration: None for weights alone."""

    key: str
    source: SourceReference
    recipe: Recipe
    request: AllocationRequest | None
    calibration: FileReference | None
    sensitivities: FileReference | None
    evaluation: Evaluation
    evaluation_tokens: FileReference | None
    names: dict[str, str]
    keep_bundle: bool


Work = TokensWork | SensitivityWork | CellWork


@dataclass(frozen=True)
class Outcome:
    """What a piece of work ended with: a result of a cell, nothing of other work, or an error."""

    key: str
    seconds: float
    error: str | None = None
    result: CellResult | None = None
    kind: Literal["done", "there", "failed"] = "done"


def perform(work: Work, place: Place, resources: Resources, *needs: Outcome) -> Outcome:
    """Do a piece of work; needs: outcomes of what it depends on. Never raises: an error is an outcome."""
    began = time.time()
    try:
        for need in needs:
            if need.error:
                return Outcome(work.key, 0.0, f"{need.key}: {need.error}", kind="failed")
        with _threads(resources.cores):
            if isinstance(work, CellWork):
                return _cell(work, place, resources, began)
            if place.has(work.key):
                return Outcome(work.key, 0.0, kind="there")
            _tokens(work, place) if isinstance(work, TokensWork) else _sensitivities(work, place)
        return Outcome(work.key, round(time.time() - began, 1))
    except Exception as error:  # whatever it is must not stop the other cells
        return Outcome(work.key, round(time.time() - began, 1), error_of(error), kind="failed")


@contextmanager
def _threads(cores: int) -> Iterator[None]:
    """Let libraries compute with so many threads, and with as many as before afterwards."""
    import numba
    import torch

    before, variable = torch.get_num_threads(), os.environ.get("OMP_NUM_THREADS")
    compiled, most = numba.get_num_threads(), numba.config.NUMBA_NUM_THREADS  # type: ignore[attr-defined]
    threads = min(cores, most)
    torch.set_num_threads(cores)
    numba.set_num_threads(threads)
    os.environ["OMP_NUM_THREADS"] = str(cores)  # of libraries that are still to be loaded
    try:
        yield
    finally:
        torch.set_num_threads(before)
        numba.set_num_threads(compiled)
        os.environ.pop("OMP_NUM_THREADS")
        if variable is not None:
            os.environ["OMP_NUM_THREADS"] = variable


def _where(source: SourceReference, place: Place) -> str:
    """Return a source that this machine can open."""
    if source.copy is None:
        return source.where
    if source.where:
        return str(fetch_source(source.where, place.here / "sources" / source.copy))
    return str(place.fetch(f"sources/{source.copy}"))


def _tokens(work: TokensWork, place: Place) -> None:
    with place.work(work.key) as folder:
        finished = folder / "finished"
        shutil.rmtree(finished, ignore_errors=True)
        finished.mkdir()
        one, source = work.calibration, work.source
        calibrate(
            _where(source, place),
            finished / TOKENS,
            tokens=[file.open(place) for file in work.tokens],
            audio=[file.open(place) for file in work.audio],
            sessions=one.sessions,
            frames=one.frames,
            revision=source.revision,
            adapter=source.adapter,
            fill_depformer_steps=source.fill_depformer_steps,
        )
        place.deliver(finished, work.key)


def _sensitivities(work: SensitivityWork, place: Place) -> None:
    source = work.source
    with place.work(work.key) as folder, ExitStack() as stack:
        finished = folder / "finished"
        shutil.rmtree(finished, ignore_errors=True)
        finished.mkdir()
        which = (source.revision, source.adapter, source.fill_depformer_steps)
        opened = stack.enter_context(open_named(_where(source, place), *which))
        measured = fingerprint(opened, quiet=True)
        file = folder / SENSITIVITIES  # a measurement that was interrupted resumes here
        sensitivities(opened, measured, work.tokens.open(place), folder / "tokens", file, quiet=True)
        shutil.copyfile(file, finished / SENSITIVITIES)
        place.deliver(finished, work.key)


def is_finished(place: Place, key: str, keep_bundle: bool) -> bool:
    """Tell whether a cell has its result, and its bundle where that is kept."""
    return place.has(f"{CELLS}/{key}") and (not keep_bundle or place.has(f"{BUNDLES}/{key}"))


def _cell(work: CellWork, place: Place, resources: Resources, began: float) -> Outcome:
    if is_finished(place, work.key, work.keep_bundle):
        return Outcome(work.key, 0.0, result=read_result(place.fetch(f"{CELLS}/{work.key}") / RESULT), kind="there")
    with place.work(f"{CELLS}/{work.key}") as folder:
        bundle, source = folder / "bundle", work.source
        opened = open_conversion(
            _where(source, place),
            bundle,
            work.recipe,
            revision=source.revision,
            adapter=source.adapter,
            fill_depformer_steps=source.fill_depformer_steps,
        )
        with opened as conversion:
            recipe = work.recipe
            tokens = work.calibration.open(place) if work.calibration else None
            if work.request and work.sensitivities and tokens:
                file = work.sensitivities.open(place)
                measured = sensitivities(conversion.source, conversion.fingerprints, tokens, bundle, file, quiet=True)
                recipe = best_recipe(inventory(conversion.source), work.request, measured).recipe
            gpus = resources.whole_gpus
            quantizer = quantizer_for(tokens, gpus=gpus) if conversion.needs_data(recipe) else None
            conversion.write(recipe, quantizer, resources.cores)
            asked = work.evaluation
            read = work.evaluation_tokens.open(place) if work.evaluation_tokens else None
            options = VerifyOptions(read, None, asked.sequences, asked.frames, controls=asked.controls)
            report = verify(bundle, conversion.source, adapter=source.adapter, options=options, same_source=True)
        finished = folder / "finished"
        shutil.rmtree(finished, ignore_errors=True)
        shutil.copytree(bundle / FOLDER, finished / FOLDER)
        shutil.copyfile(bundle / MANIFEST, finished / MANIFEST)
        result = result_of(report, work.names, began)
        write_text(finished / RECIPE, to_toml(recipe))
        write_text(finished / RESULT, to_text(result))
        if work.keep_bundle:
            place.deliver(bundle, f"{BUNDLES}/{work.key}")
        place.deliver(finished, f"{CELLS}/{work.key}")
    return Outcome(work.key, times_since(began).seconds, result=result)
