"""Where a bundle will stand: checked before any work, and named before what is written beside it."""

import errno
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from ..errors import UserError
from ..hints import Hint
from .manifest import Manifest, read_manifest, untracked_files
from .plan import Plan


def named(output: Path) -> Path:
    """Return the folder that an output means: what stands beside it lies in its parent, also for ``.`` or a link.

    The working folder is named absolutely: a bundle takes its place, and relative names would mean nothing then.
    """
    here = output.is_dir() and output.samefile(Path())
    return output.resolve() if here or output.is_symlink() or output.name in ("", "..") else output


def check_output(output: Path, force: bool = False) -> Manifest | None:
    """Return the manifest of a bundle that is at ``output`` already, None if there is nothing.

    Raises UserError for anything else there, which a conversion never touches, and for a place where nothing can be
    written.
    """
    if not output.exists():
        _check_writable(output)
        return None
    if not output.is_dir():
        raise UserError(f"{output}: is a file", Hint.OTHER_OUTPUT)
    manifest = read_manifest(output)
    if manifest is None and any(output.iterdir()):
        raise UserError(f"{output}: holds files that are no bundle", Hint.OTHER_OUTPUT_OR_EMPTY)
    if manifest and force and (others := untracked_files(output, manifest)):
        raise UserError(f"{output}: holds files that are not of its bundle ({', '.join(others)}): move them first")
    if manifest is None or force:
        _check_writable(output)
        return None
    return manifest


def _check_writable(output: Path) -> None:
    """Raise UserError if the nearest existing folder above an output cannot take what is written beside it."""
    above = next(parent for parent in output.absolute().parents if parent.exists() or parent.is_symlink())
    if not above.is_dir():
        raise UserError(f"{above}: is not a folder", Hint.OTHER_OUTPUT)
    if not os.access(above, os.W_OK | os.X_OK):
        raise UserError(f"{above}: is not writable", Hint.OTHER_OUTPUT)


def check_new_file(path: Path, suffix: str, force: bool | None) -> None:
    """Raise UserError if a file of this kind cannot be written there, or is there already and not to be replaced.

    force: None where the caller has no way to replace one.
    """
    if path.suffix != suffix or not path.parent.is_dir():
        raise UserError(f"{path}: give the name of a {suffix} file in a folder that is there")
    check_file(path)
    if path.exists() and not force:
        raise UserError(f"{path}: is there already", Hint.OTHER_NAME if force is None else Hint.OTHER_NAME_OR_REPLACE)


def check_file(path: Path) -> None:
    """Raise UserError if there is no folder in which a file of this name can be written."""
    if not path.parent.is_dir():
        raise UserError(f"{path}: give the name of a file in a folder that is there")
    if not os.access(path.parent, os.W_OK | os.X_OK):
        raise UserError(f"{path.parent}: is not writable: choose another folder")


def make_parent(output: Path) -> None:
    """Make the folders above an output, where files beside it are written as well; raises UserError if that fails."""
    with disk_errors(output):
        output.parent.mkdir(parents=True, exist_ok=True)


def make_place(plan: Plan, output: Path, with_store: bool) -> None:
    """Make the folders above an output; raises UserError if they cannot be made, or the bundle does not fit there.

    with_store: whether quantized weights are kept beside it until it is whole.
    """
    make_parent(output)
    with disk_errors(output):
        folders = (output.with_name(f"{output.name}.partial"), store_folder(output))
        there = sum(path.stat().st_size for folder in folders for path in folder.rglob("*") if path.is_file())
        free = shutil.disk_usage(output.parent).free
        needed = plan.free_disk + (plan.nbytes if with_store else 0)
        if free + there < needed:
            raise UserError(
                f"{output.parent}: {free / 1e9:.2f} GB are free and {(needed - there) / 1e9:.2f} GB are needed",
                Hint.FREE_DISK,
            )


def enter_again(output: Path) -> None:
    """Make a bundle the working folder where it took that one's place, so that relative names mean what they did."""
    try:
        Path.cwd()
    except FileNotFoundError:
        os.chdir(output)


def store_folder(output: Path) -> Path:
    """Return where quantized weights are kept until a bundle is whole."""
    return output.with_name(f"{output.name}.solution.partial")


@contextmanager
def disk_errors(output: Path) -> Iterator[None]:
    """Turn an error of the disk into one line; what is complete stays."""
    try:
        yield
    except OSError as error:
        what = error.strerror or str(error)
        where = error.filename or output
        full = error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
        hint = "free some space, and run the command again: it resumes" if full else Hint.MEND_OR_OTHER_OUTPUT
        raise UserError(f"{where}: {what}", hint) from None
