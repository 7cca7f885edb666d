"""Starts the programs for the tests: one process imports the slow libraries, and forks for each command.

A program takes two to three seconds to import PyTorch, MLX and matplotlib, and a run of the tests starts hundreds of
them. Each command still runs in a process of its own, with its own arguments, folder, environment, output and exit
status, as ``python -m MODULE`` would. The server must have computed nothing when it forks: threads don't survive.
"""

import atexit
import gc
import importlib
import json
import os
import runpy
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from stopping import Moment, stop_at

# Not huggingface_hub, typer or rich: they read the environment when they are imported.
SLOW = (
    "jinja2",
    "matplotlib.backends.backend_svg",
    "matplotlib.figure",
    "mlx.core",
    "numba",
    "pocketsphinx",
    "safetensors.torch",
    "sentencepiece",
    "torch",
    "httpx2",
    "filelock",
    "yaml",
)


class Programs:
    """An open server; ``run`` behaves as ``subprocess.run`` with captured text does."""

    def __init__(self, environment: Mapping[str, str]) -> None:
        """environment: what the server itself has besides this process's own; libraries look there for their caches."""
        self.environment = os.environ | environment
        self.server: subprocess.Popen[str] | None = None

    def run(
        self,
        module: str,
        arguments: Sequence[str],
        cwd: Path,
        environment: Mapping[str, str],
        stop: tuple[Moment, int] | None = None,
        timeout: float = 300,
    ) -> subprocess.CompletedProcess[str]:
        """Run a module with arguments; raises ``subprocess.TimeoutExpired`` after ``timeout`` seconds.

        stop: a moment, and the signal that the program gets then.
        """
        with tempfile.TemporaryDirectory() as folder:
            asked: dict[str, Any] = {
                "module": module,
                "arguments": list(arguments),
                "cwd": str(cwd),
                "environment": dict(environment),
                "output": [f"{folder}/out", f"{folder}/err"],
                "stop": stop and [asdict(stop[0]), stop[1]],
                "timeout": timeout,
            }
            status = self._ask(asked)
            out, err = (Path(path).read_text() for path in asked["output"])
        if status is None:
            raise subprocess.TimeoutExpired([module, *arguments], timeout, out, err)
        return subprocess.CompletedProcess([module, *arguments], status, out, err)

    def _ask(self, asked: dict[str, Any]) -> int | None:
        if self.server is None:
            command = [sys.executable, __file__]
            self.server = subprocess.Popen(
                command, text=True, env=self.environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE
            )
        assert self.server.stdin is not None
        assert self.server.stdout is not None
        self.server.stdin.write(json.dumps(asked) + "\n")
        self.server.stdin.flush()
        status: int | None = json.loads(self.server.stdout.readline())
        return status

    def close(self) -> None:
        """End the server."""
        if self.server is not None:
            self.server.communicate()


def become(asked: dict[str, Any]) -> None:
    """Turn a forked process into the program, until it ends."""
    os.setsid()
    for number, path in enumerate(asked["output"], 1):
        os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT, 0o600), number)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    sys.stdin = os.fdopen(0)
    sys.stdout, sys.stderr = os.fdopen(1, "w"), os.fdopen(2, "w", buffering=1)
    os.chdir(asked["cwd"])
    os.environ.clear()
    os.environ.update(asked["environment"])
    sys.argv = ["-m", *asked["arguments"]]
    sys.path[0] = asked["cwd"]
    signal.signal(signal.SIGINT, signal.default_int_handler)  # which shells let background processes ignore
    if asked["stop"]:
        moment, number = asked["stop"]
        stop_at(Moment(**moment), number)
    try:
        runpy.run_module(asked["module"], run_name="__main__", alter_sys=True)
        status = 0
    except SystemExit as end:
        status = end.code if isinstance(end.code, int) else 0 if end.code is None else 1
    except BaseException:
        traceback.print_exc()
        status = 1
    atexit._run_exitfuncs()
    sys.stdout.flush()
    os._exit(status)  # taking the libraries down takes longer than many a command


def wait(child: int, timeout: float) -> int | None:
    """Return a child's exit status as subprocess gives it; None if it had to be ended after ``timeout`` seconds."""
    end = time.monotonic() + timeout
    pause = 0.001
    while time.monotonic() < end:
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            return os.waitstatus_to_exitcode(status)
        time.sleep(pause)
        pause = min(2 * pause, 0.05)
    os.killpg(child, signal.SIGKILL)
    os.waitpid(child, 0)
    return None


def serve() -> None:
    """Answer lines of JSON on standard input with exit statuses on standard output, until the input ends."""
    for name in SLOW:
        importlib.import_module(name)
    gc.freeze()
    answers = os.fdopen(os.dup(1), "w")
    while line := sys.stdin.readline():
        asked = json.loads(line)
        child = os.fork()
        if child == 0:
            answers.close()
            become(asked)
        answers.write(json.dumps(wait(child, asked["timeout"])) + "\n")
        answers.flush()


if __name__ == "__main__":
    serve()
