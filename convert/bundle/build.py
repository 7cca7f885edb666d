"""Building a bundle from an open source and a plan: files, read-back, manifest."""

import json
import shutil
from collections.abc import Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import CheckFailed, UserError
from ..hints import Hint
from ..parallel import cores
from ..progress import byte_bar
from ..source.scan import Fingerprint
from ..source.source import Source, fingerprint
from ..tensorfile import Spec
from .destination import check_output, disk_errors, make_place, named, store_folder
from .manifest import Manifest, make_manifest
from .manifest import fingerprint as plan_fingerprint
from .plan import Plan, PlannedFile, voice_specs
from .quantized_store import LayerwiseQuantizer, QuantizedStore
from .readback import check_hash, check_tensors
from .recipe import DTYPES, Recipe
from .recipe_file import to_toml
from .records import TensorRecord, VoiceRecord, WrittenFile
from .workspace import Workspace, clear_leftovers
from .writer import write_bytes, write_copy, write_tensors, write_voice


@dataclass(frozen=True)
class Conversion:
    """A finished conversion. files_written: in this run; the others were there from an earlier one."""

    folder: Path
    manifest: Manifest
    files_written: int

    def to_json(self) -> dict[str, Any]:
        """Return it as JSON-ready values: the folder, how many files were written, and the manifest."""
        return {"output": str(self.folder), "files_made": self.files_written, **self.manifest.to_json()}


def build(
    source: Source,
    plan: Plan,
    output: Path,
    *,
    force: bool = False,
    workers: int | None = None,
    quiet: bool = False,
    quantizer: LayerwiseQuantizer | None = None,
    fingerprints: Mapping[str, Fingerprint] | None = None,
) -> Conversion:
    """Make a bundle at ``output`` and read it back; resumes from what a killed run left there.

    quantizer: for the tensors that the plan quantizes with data. fingerprints: of the source's files since it was
    opened, taken here if they are not given. force: replace a bundle, or discard an unfinished one,
    that stands for something else. Raises UserError for what the user can mend, CheckFailed if the disk does not give
    back what was written.
    """
    workers, output = workers or cores(), named(output)
    present = check_output(output, force)
    if present is None:
        make_place(plan, output, quantizer is not None)
    fingerprints = fingerprints or fingerprint(source, quiet)
    calibration = quantizer.record if quantizer else None
    fingerprint_of_bundle = plan_fingerprint(plan, source, fingerprints, calibration)
    if present is not None:
        if present.fingerprint != fingerprint_of_bundle:
            raise _other_bundle(output)
        _read_back_all(output, plan, present.files, quiet)
        clear_leftovers(output)
        return Conversion(output, present, 0)
    with disk_errors(output), closing(Workspace(output, fingerprint_of_bundle, force)) as workspace:
        with _store(quantizer, output, fingerprint_of_bundle) as store:
            written = _make_files(workspace, source, plan, fingerprints, workers, quiet, store)
        source.check_unchanged("converted")
        manifest = make_manifest(plan, source, fingerprints, workspace.files, calibration)
        check_output(output, force)  # once more: another run may have ended meanwhile
        workspace.publish(json.dumps(manifest.to_json(), indent=1, ensure_ascii=False) + "\n", replaces=force)
        if quantizer:
            shutil.rmtree(store_folder(output), ignore_errors=True)
    return Conversion(output, manifest, written)


def check_same(
    present: Manifest, output: Path, fingerprints: Mapping[str, Fingerprint], recipe: Recipe | None = None
) -> None:
    """Raise UserError for a finished bundle that is surely of another source or recipe, before hours are spent.

    recipe: None where it is not known yet.
    """
    if present.source.files != fingerprints or (recipe and present.recipe.text != to_toml(recipe)):
        raise _other_bundle(output)


def _other_bundle(output: Path) -> UserError:
    return UserError(
        f"{output}: holds a bundle of another source, with other settings or of other versions",
        Hint.OTHER_OUTPUT_OR_REPLACE,
    )


@contextmanager
def _store(quantizer: LayerwiseQuantizer | None, output: Path, fingerprint: str) -> Iterator[QuantizedStore | None]:
    """Quantize with data what is not in the store yet; the store stays until the bundle is whole."""
    if quantizer is None:
        yield None
        return
    with QuantizedStore(store_folder(output), fingerprint) as store:
        quantizer.quantize(store)
        yield store


def _make_files(
    workspace: Workspace,
    source: Source,
    plan: Plan,
    fingerprints: Mapping[str, Fingerprint],
    workers: int,
    quiet: bool,
    store: QuantizedStore | None,
) -> int:
    """Write every file that the workspace does not hold yet; return how many.

    While one file is written, the ones before are read back.
    """
    written = 0
    voices = {voice.name: voice for voice in source.voices}
    with (
        byte_bar("converting", plan.nbytes, quiet) as bar,
        ThreadPoolExecutor(1, thread_name_prefix="ppx-readback") as reader,
    ):
        checks: list[Future[None]] = []
        for file in plan.files:
            bar.set_postfix_str(file.name, refresh=False)
            if file.name in workspace.files and _is_whole(workspace, plan, file):
                bar.update(file.nbytes)
                continue
            temporary = workspace.temporary(file.name)
            tensors: tuple[TensorRecord, ...] = ()
            voice_records: tuple[VoiceRecord, ...] = ()
            if file.outputs:
                sha256, tensors = write_tensors(temporary, file, source.checkpoint, workers, bar, store)
            elif file.voice:
                voice = voices[file.voice]
                sha256, voice_records = write_voice(temporary, file, voice, specs_of(plan, file), bar)
            elif file.copy:
                (name,) = source.location.files.by_kind()[file.copy]
                sha256 = write_copy(temporary, source.location.folder / name, fingerprints[name].sha256, bar)
            else:
                sha256 = write_bytes(temporary, file.data or file.text.encode(), bar)
            workspace.rename(file.name)
            written += 1
            if specs := specs_of(plan, file):
                check_tensors(workspace.path(file.name), specs)
            record = WrittenFile(file.nbytes, sha256, tensors, voice_records)
            checks.append(reader.submit(_read_back, workspace, file.name, record))
            for check in checks:
                if check.done():
                    check.result()
        for check in checks:
            check.result()
    return written


def _read_back(workspace: Workspace, name: str, record: WrittenFile) -> None:
    """Compare a written file with what was meant to be written, and note in the journal that it is complete."""
    check_hash(workspace.path(name), record.size, record.sha256)
    workspace.commit(name, record)


def specs_of(plan: Plan, file: PlannedFile) -> list[Spec]:
    """Return the tensors of a file, none for a copy or text."""
    if file.voice:
        return voice_specs(plan.inventory, file.voice, DTYPES[plan.recipe.dtype], plan.target.voice_cache or "")
    return [spec for output in file.outputs for spec in output.specs()]


def _is_whole(workspace: Workspace, plan: Plan, file: PlannedFile) -> bool:
    """Tell whether a file of an earlier run is still what it was; forget it if not."""
    record = workspace.files[file.name]
    try:
        check_hash(workspace.path(file.name), record.size, record.sha256)
        if specs := specs_of(plan, file):
            check_tensors(workspace.path(file.name), specs)
    except (CheckFailed, OSError):
        workspace.forget(file.name)
        return False
    return True


def _read_back_all(output: Path, plan: Plan, files: Mapping[str, Fingerprint], quiet: bool) -> None:
    """Check every file of a finished bundle; raises CheckFailed for one that is not what its manifest says."""
    with byte_bar("reading back", plan.nbytes, quiet) as bar:
        for file in plan.files:
            path = output / file.name
            if file.name not in files or not path.is_file():
                raise CheckFailed(f"{path}: missing from a finished bundle", Hint.MAKE_AGAIN)
            try:
                check_hash(path, files[file.name].size, files[file.name].sha256)
                if specs := specs_of(plan, file):
                    check_tensors(path, specs)
            except CheckFailed as error:
                raise CheckFailed(error.problem.message, Hint.MAKE_AGAIN_OR_CHECK_DISK) from None
            bar.update(file.nbytes)
