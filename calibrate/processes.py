"""Processes of this host that compute one result together: started, watched, and ended together.

Each is a new Python (a GPU does not survive a fork) that reads a function from its standard input, calls it with its
``Workers``, and writes what it returns, or why it failed, to its standard output. It ends when that input is closed, so
that none outlives who started it.
"""

import os
import pickle
import signal
import subprocess
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, Generic, TypeVar

from ..convert.errors import CheckFailed, UserError
from ..quant.processors import cores
from .workers import Workers

Result = TypeVar("Result")

_GRACE = 5.0  # seconds in which a process that lost another one fails too: which of them is why is known then
_FOR_PEOPLE = (UserError, CheckFailed, OSError)  # errors whose message is all that a person needs


@dataclass(frozen=True)
class _Task(Generic[Result]):
    """What one process does. path: where it finds modules. processors: those it may use, None for all."""

    function: Callable[[Workers], Result]
    rank: int
    size: int
    meeting: Path
    threads: int
    processors: frozenset[int] | None


@dataclass(frozen=True)
class _Failure:
    """Why a process ended: an error whose message people read, or a traceback. moment: by the clock, in seconds."""

    error: Exception | None
    traceback: str
    moment: float


@dataclass(frozen=True)
class _Ending:
    """How a process ended. status: negative for a signal. answer: None if it wrote none."""

    rank: int
    status: int
    answer: "tuple[object] | _Failure | None"


def compute_together(function: Callable[[Workers], Result], size: int) -> list[Result]:
    """Call a function in ``size`` processes that exchange what they compute; return what it returns in each.

    function: one that pickle finds by its name, or a ``functools.partial`` of it. Processors are divided between the
    processes; each has the GPU of its rank, where there are GPUs. When one of them fails, or this one is interrupted,
    all end. Raises what was raised there if it is meant for people, UserError for a process that was killed.
    """
    import torch

    if torch.cuda.is_available():
        torch.cuda.empty_cache()  # the first of them uses the same GPU
    threads = max(1, torch.get_num_threads() // size)
    environment = os.environ | {"OMP_NUM_THREADS": str(threads)}
    processes: list[subprocess.Popen[bytes]] = []
    with tempfile.TemporaryDirectory(prefix="ppx-") as folder, ThreadPoolExecutor(size) as pool:
        try:
            endings = []
            for rank, processors in enumerate(_divided(size)):
                command = [sys.executable, "-P", "-c", f"import sys; sys.path[:] = {sys.path!r}; {_MAIN}"]
                # A session of its own: Ctrl-C on the terminal reaches this process only, which ends the others.
                process = subprocess.Popen(  # noqa: S603  (this Python, with our own module)
                    command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=environment, start_new_session=True
                )
                processes.append(process)
                task = _Task(function, rank, size, Path(folder, "meeting"), threads, processors)
                endings.append(pool.submit(_ending, rank, process, pickle.dumps(task)))
            return _results(endings)
        finally:
            for process in processes:
                process.kill()


_MAIN = f"from {__name__} import main; main()"


def _divided(size: int) -> list[frozenset[int] | None]:
    """Return the processors of each process: as many each as there are, or one that others use too."""
    if not hasattr(os, "sched_getaffinity"):
        return [None] * size
    there, count = sorted(os.sched_getaffinity(0)), cores()
    shares = [there[count * rank // size : count * (rank + 1) // size] for rank in range(size)]
    return [frozenset(share or [there[rank % count]]) for rank, share in enumerate(shares)]


def _ending(rank: int, process: "subprocess.Popen[bytes]", task: bytes) -> _Ending:
    """Give a process its task, and wait for its end."""
    assert process.stdin is not None  # noqa: S101  (both are pipes)
    assert process.stdout is not None  # noqa: S101
    with suppress(BrokenPipeError):  # it has ended, and its status says how
        process.stdin.write(task)
        process.stdin.flush()
    written = process.stdout.read()
    status = process.wait()
    with suppress(BrokenPipeError):
        process.stdin.close()
    process.stdout.close()
    answer = None
    with suppress(EOFError, pickle.UnpicklingError):  # it was ended while it wrote
        answer = pickle.loads(written)  # noqa: S301  (of our own process)
    return _Ending(rank, status, answer)


def _results(endings: "Sequence[Future[_Ending]]") -> list[Result]:
    """Return the results of all processes; raise why the first one failed, as soon as one has."""
    pending, ended = set(endings), list[_Ending]()
    while pending:
        done, pending = wait(pending, return_when=FIRST_COMPLETED)
        ended += [one.result() for one in done]
        if any(not isinstance(one.answer, tuple) for one in ended):
            done, _ = wait(pending, timeout=_GRACE)
            _fail([*ended, *(one.result() for one in done)], len(endings))
    by_rank: list[Result] = [one.answer[0] for one in sorted(ended, key=lambda one: one.rank)]  # type: ignore[index, misc]
    return by_rank


def _fail(ended: Sequence[_Ending], size: int) -> None:
    """Raise why processes failed: the first of them; others may only have lost that one."""
    failures = sorted(
        (one.answer for one in ended if isinstance(one.answer, _Failure)), key=lambda failure: failure.moment
    )
    for failure in failures:
        if failure.error:
            raise failure.error
    for one in ended:
        if one.answer is None:
            how = signal.Signals(-one.status).name if one.status < 0 else f"status {one.status}"
            why = " (which is what happens where memory runs out)" if one.status == -signal.SIGKILL else ""
            message = f"process {one.rank + 1} of {size} ended with {how}{why}"
            raise UserError(message, "run the same command again to resume")
    raise RuntimeError(f"a process failed:\n{failures[0].traceback}")


def main() -> None:
    """Be one of the processes."""
    answers = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # what libraries print is no answer
    task: _Task[object] = pickle.load(sys.stdin.buffer)  # noqa: S301  (of the process that started this one)
    threading.Thread(target=_end_with, args=(sys.stdin.buffer,), daemon=True).start()
    if task.processors is not None:
        os.sched_setaffinity(0, task.processors)
    status, answer = 0, _answer(task)
    if isinstance(answer, _Failure):
        status = 1
    answers.write(pickle.dumps(answer))
    answers.close()
    sys.stderr.flush()
    os._exit(status)  # connections to others that failed would be waited for


def _answer(task: _Task[object]) -> "tuple[object] | _Failure":
    """Return what a task returns, or why it failed."""
    import torch

    from .workers import joined

    torch.set_num_threads(task.threads)
    try:
        with joined(task.rank, task.size, task.meeting) as workers:
            return (task.function(workers),)
    except _FOR_PEOPLE as error:
        return _Failure(error, traceback.format_exc(), time.monotonic())
    except Exception:
        return _Failure(None, traceback.format_exc(), time.monotonic())


def _end_with(stream: BinaryIO) -> None:
    """End this process when a stream does: who started it is gone."""
    stream.read()
    os._exit(1)
