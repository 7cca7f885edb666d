"""Commands as processes of their own, timed, with the memory that they alone took."""

import json
import resource
import subprocess
import sys
from dataclasses import dataclass

# A child begins with its parent's memory, which counts in its ``ru_maxrss``: a small process must start it.
_LAUNCHER = """
import json, resource, subprocess, sys, time
start = time.perf_counter()
done = subprocess.run(sys.argv[1:], stdout=subprocess.PIPE, text=True)
seconds = time.perf_counter() - start
peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss
print(json.dumps([done.returncode, seconds, peak, done.stdout]))
"""


_UNIT = 1 if sys.platform == "darwin" else 1024  # of ``ru_maxrss``, in bytes


@dataclass(frozen=True)
class Finished:
    """A process that ended. memory: its largest resident set, in bytes. output: its standard output."""

    seconds: float
    memory: int
    output: str


def run(command: list[str], allowed: tuple[int, ...] = (0,)) -> Finished:
    """Run a command to its end; raises SystemExit for another status than those allowed."""
    launcher = [sys.executable, "-I", "-S", "-c", _LAUNCHER]
    launched = subprocess.run([*launcher, *command], stdout=subprocess.PIPE, text=True)
    if launched.returncode:
        raise SystemExit(f"{' '.join(command)}: could not be started")
    status, seconds, peak, output = json.loads(launched.stdout)
    if status not in allowed:
        raise SystemExit(f"{' '.join(command)} ended with {status}")
    return Finished(seconds, peak * _UNIT, output)


def own_memory() -> int:
    """Return the largest resident set of this process so far, in bytes."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * _UNIT


def run_program(program: str, *arguments: str) -> str:
    """Run one of the programs; return what it prints. A bundle that is not intact is a result, too."""
    command = [sys.executable, "-m", f"ppx.recipes.cli.{program}", *arguments]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True)
    if done.returncode not in (0, 1):
        raise SystemExit(f"{' '.join(command)} ended with {done.returncode}")
    return done.stdout
