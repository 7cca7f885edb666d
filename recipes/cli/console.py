"""What the command-line programs share: how they end, and how they say why."""

import functools
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from types import FrameType
from typing import ParamSpec, TypeVar

import typer

from ...convert.bundle.manifest import TOOLKIT
from ...convert.errors import CheckFailed, UserError, printable

P = ParamSpec("P")
R = TypeVar("R")

FAILED, MISTAKE, INTERRUPTED, TERMINATED = 1, 2, 130, 143  # exit statuses


CONVERSION = "interrupted: the same command goes on with the files that are complete"


class Terminated(BaseException):
    """SIGTERM came: everything on the way out is closed, as it is after Ctrl-C."""


@contextmanager
def _terminable() -> Iterator[None]:
    """Raise Terminated in the main thread when SIGTERM comes; leave it alone where it is ignored."""
    if threading.current_thread() is not threading.main_thread() or signal.getsignal(signal.SIGTERM) == signal.SIG_IGN:
        yield
        return

    def raise_terminated(_number: int, _frame: FrameType | None) -> None:
        raise Terminated

    before = signal.signal(signal.SIGTERM, raise_terminated)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def reported(command: Callable[P, R], interrupted: str = CONVERSION) -> Callable[P, R]:
    """Let a command end in one line a problem and an exit status, never in a traceback, for what users can mend."""

    @functools.wraps(command)
    def run(*args: P.args, **kwargs: P.kwargs) -> R:
        try:
            with _terminable():
                return command(*args, **kwargs)
        except UserError as error:
            for problem in error.problems:
                say(f"error: {problem}")
            raise typer.Exit(MISTAKE) from None
        except CheckFailed as error:
            say(f"check failed: {error}")
            raise typer.Exit(FAILED) from None
        except OSError as error:
            say(f"error: {error.filename or 'input/output'}: {error.strerror or error}")
            raise typer.Exit(MISTAKE) from None
        except KeyboardInterrupt:
            say(interrupted)
            raise typer.Exit(INTERRUPTED) from None
        except Terminated:
            say(interrupted.replace("interrupted", "terminated", 1))
            raise typer.Exit(TERMINATED) from None

    return run


def show(text: str) -> None:
    """Print lines for people: names from files of others cannot command the terminal."""
    typer.echo("\n".join(map(printable, text.split("\n"))))


def say(line: str) -> None:
    """Write a line for people, beside the output."""
    typer.echo(printable(line), err=True)


def quiet(as_json: bool) -> bool:
    """Tell whether progress bars would only disturb: output for a program, or nobody looks at standard error."""
    return as_json or sys.stderr is None or not sys.stderr.isatty()


def check_new(path: Path, suffix: str, force: bool) -> None:
    """Raise UserError if a file of this kind cannot be written there, or is there already."""
    if path.suffix != suffix or not path.parent.is_dir():
        raise UserError(f"{path}: give the name of a {suffix} file in a folder that is there")
    check_folder(path)
    if path.exists() and not force:
        raise UserError(f"{path}: is there already: choose another --output, or replace it with --force")


def check_folder(path: Path) -> None:
    """Raise UserError if there is no folder in which a file of this name can be written."""
    if not path.parent.is_dir():
        raise UserError(f"{path}: give the name of a file in a folder that is there")
    if not os.access(path.parent, os.W_OK | os.X_OK):
        raise UserError(f"{path.parent}: is not writable: choose another folder")


def show_version(asked: bool) -> None:
    """Print the version and end, where it is asked for."""
    if asked:
        typer.echo(f"{TOOLKIT} {version(TOOLKIT)}")
        raise typer.Exit
