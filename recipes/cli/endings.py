"""How the command-line programs end: one line and an exit status, with a traceback only where it is wanted."""

import functools
import logging
import os
import signal
import threading
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import ParamSpec, TypeVar

import typer

from ...convert.errors import CheckFailed, UserError
from .console import say
from .hints import HINTS
from .usage import MISTAKE

P = ParamSpec("P")
R = TypeVar("R")

FAILED, INTERRUPTED, TERMINATED = 1, 130, 143  # exit statuses
CONVERSION = "interrupted: run the same command again to resume"


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
        debug = bool(kwargs.get("_debug")) or os.environ.get("PPX_DEBUG") == "1"
        try:
            with _terminable(), _warnings_said():
                return command(*args, **kwargs)
        except UserError as error:
            _say_traceback(error, debug)
            for problem in error.problems:
                say(f"error: {problem.line(HINTS)}")
            raise typer.Exit(MISTAKE) from None
        except CheckFailed as error:
            _say_traceback(error, debug)
            say(f"check failed: {error.problem.line(HINTS)}")
            raise typer.Exit(FAILED) from None
        except OSError as error:
            _say_traceback(error, debug)
            say(f"error: {error.filename or 'input/output'}: {error.strerror or error}")
            raise typer.Exit(MISTAKE) from None
        except KeyboardInterrupt as stopped:
            say(_stopped(stopped, interrupted))
            raise typer.Exit(INTERRUPTED) from None
        except Terminated as stopped:
            say(_stopped(stopped, interrupted).replace("interrupted", "terminated", 1))
            raise typer.Exit(TERMINATED) from None

    return run


def _stopped(interrupt: BaseException, line: str) -> str:
    """Return what is said of an interrupted command: what is kept, where the work has noted that."""
    kept = getattr(interrupt, "__notes__", [])
    return CONVERSION.replace(": ", f": {'; '.join(kept)}; ", 1) if kept else line


def _say_traceback(error: BaseException, debug: bool) -> None:
    """Print the traceback of an error, with those of the errors that it was made of, where that is wanted."""
    if debug:
        cause: BaseException | None = error
        while cause:
            cause.__suppress_context__, cause = False, cause.__context__
        for line in "".join(traceback.format_exception(error)).splitlines():
            say(line)


class _Sayer(logging.Handler):
    """Prints what the library warns of as a line of the program's."""

    def emit(self, record: logging.LogRecord) -> None:
        """Print a warning."""
        say(record.getMessage())


@contextmanager
def _warnings_said() -> Iterator[None]:
    """Print the library's warnings on standard error while a command runs."""
    logger, handler = logging.getLogger(__name__.partition(".")[0]), _Sayer(logging.WARNING)
    logger.addHandler(handler)
    try:
        yield
    finally:
        logger.removeHandler(handler)
