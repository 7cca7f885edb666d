"""Sends a program a signal at an exact moment of its work, from inside, by Python's audit events.

``python tests/stopping.py EVENT:NAME:NUMBER:(before|after) SIGNAL MODULE ARGUMENT...`` runs a module so.
The server of programs does it in a fork.
"""

import os
import runpy
import signal
import sys
import threading
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Moment:
    """When a program is stopped: before or after the n-th event of a kind one of whose paths ends with some name.

    event: ``open``, ``os.mkdir``, ``os.rename`` or another event of https://docs.python.org/3/library/audit_events.html
    after: whether the event's own work is done, which is when the next event of the same thread comes.
    """

    event: str
    name: str
    number: int = 1
    after: bool = False

    def __str__(self) -> str:
        """Return it as ``parse`` reads it; file names must not hold colons."""
        return f"{self.event}:{self.name}:{self.number}:{'after' if self.after else 'before'}"


def parse(text: str) -> Moment:
    """Read a moment from a command line."""
    event, name, number, when = text.split(":")
    return Moment(event, name, int(number), {"before": False, "after": True}[when])


def stop_at(moment: Moment, number: int) -> None:
    """Send this process a signal when the moment comes."""
    seen = 0
    armed: list[int] = []

    def hook(event: str, arguments: tuple[object, ...]) -> None:
        nonlocal seen
        if armed:
            if armed[0] == threading.get_ident():
                armed[0] = -1  # once
                os.kill(os.getpid(), number)
            return
        if event != moment.event:
            return
        if not any(isinstance(value, str | os.PathLike) and str(value).endswith(moment.name) for value in arguments):
            return
        seen += 1
        if seen == moment.number:
            armed.append(threading.get_ident() if moment.after else -1)
            if not moment.after:
                os.kill(os.getpid(), number)

    sys.addaudithook(hook)


if __name__ == "__main__":
    description, number, module, *arguments = sys.argv[1:]
    sys.path[0] = str(Path.cwd())  # as for python -m
    signal.signal(signal.SIGINT, signal.default_int_handler)  # which shells let background processes ignore
    stop_at(parse(description), signal.Signals[number])
    sys.argv = ["-m", *arguments]
    runpy.run_module(module, run_name="__main__", alter_sys=True)
