"""Starts the programs for the tests: a process imports the slow libraries, and forks for each command.

A program takes two to three seconds to import PyTorch, MLX and matplotlib, and a run of the tests starts hundreds of
them. Each command still runs in a process of its own, with its own arguments, folder, environment, output and exit
status, as ``python -m MODULE`` would. The server must have started no threads when it forks: they don't survive.

On macOS each command is started afresh instead: Apple's frameworks, which PyTorch and MLX load, may crash in a fork.
"""

import atexit
import gc
import importlib
import io
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

import stopping
from compiling import compile_kernels
from stopping import Moment, stop_at

FORKS = sys.platform != "darwin"

LIBRARIES = (
    "filelock",
    "httpx2",
    "jinja2",
    "matplotlib.backends.backend_svg",
    "matplotlib.figure",
    "mlx.core",
    "numba",
    "pocketsphinx",
    "safetensors.torch",
    "sentencepiece",
    "torch",
    "yaml",
)
OURS = (  # and what they import; huggingface_hub and typer read the environment then
    "ppx.convert.bundle.shipped",
    "ppx.calibrate.allocation",
    "ppx.verify.plots",
    "ppx.verify.publishing.gate",
    "ppx.calibrate.tuning",
    "ppx.verify.verification",
    "huggingface_hub.hf_api",
    "typer",
)


class Programs:
    """Open servers; ``run`` behaves as ``subprocess.run`` with captured text does.

    Commands with the usual environment come from a server that has imported the toolkit, too; those with another one
    import it themselves.
    """

    def __init__(self, environment: Mapping[str, str], forks: bool = FORKS) -> None:
        """environment: the usual one; libraries look there for their caches. forks: whether to use servers at all."""
        self.environment = dict(environment)
        self.forks = forks
        self.servers: dict[bool, subprocess.Popen[str]] = {}

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
        if not self.forks:
            return run_afresh(module, arguments, cwd, environment, stop, timeout)
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
            status = self._ask(asked, usual=dict(environment) == self.environment)
            out, err = (Path(path).read_text() for path in asked["output"])
        if status is None:
            raise subprocess.TimeoutExpired([module, *arguments], timeout, out, err)
        return subprocess.CompletedProcess([module, *arguments], status, out, err)

    def _ask(self, asked: dict[str, Any], usual: bool) -> int | None:
        if usual not in self.servers:
            command = [sys.executable, __file__, *LIBRARIES, *(OURS if usual else ())]
            self.servers[usual] = subprocess.Popen(
                command, text=True, env=self.environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE
            )
        server = self.servers[usual]
        assert server.stdin is not None
        assert server.stdout is not None
        server.stdin.write(json.dumps(asked) + "\n")
        server.stdin.flush()
        status: int | None = json.loads(server.stdout.readline())
        return status

    def close(self) -> None:
        """End the servers."""
        for server in self.servers.values():
            server.communicate()


def run_afresh(
    module: str,
    arguments: Sequence[str],
    cwd: Path,
    environment: Mapping[str, str],
    stop: tuple[Moment, int] | None,
    timeout: float,
) -> subprocess.CompletedProcess[str]:
    """Run a module in a new process, as ``Programs.run`` does."""
    way = ["-m"] if stop is None else [stopping.__file__, str(stop[0]), signal.Signals(stop[1]).name]
    with subprocess.Popen(
        [sys.executable, *way, module, *arguments],
        text=True,
        cwd=cwd,
        env=environment,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        start_new_session=True,
    ) as process:
        try:
            out, err = process.communicate(timeout=timeout)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)  # and what it started
            out, err = process.communicate()
            raise subprocess.TimeoutExpired([module, *arguments], timeout, out, err) from None
    return subprocess.CompletedProcess([module, *arguments], process.returncode, out, err)


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


def wait(child: int, end: float) -> int | None:
    """Return a child's exit status as subprocess gives it; None if it had to be ended at a time of the clock."""
    pause = 0.001
    while time.monotonic() < end:
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            return os.waitstatus_to_exitcode(status)
        time.sleep(pause)
        pause = min(2 * pause, 0.05)
    os.killpg(child, signal.SIGKILL)  # and what it started
    os.waitpid(child, 0)
    return None


def draw() -> None:
    """Draw a picture, so that fonts are known and what draws is imported."""
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure

    figure = Figure(layout="constrained")
    FigureCanvasSVG(figure)
    figure.add_subplot().set_yscale("log")
    figure.savefig(io.BytesIO(), format="svg")


def serve(modules: Sequence[str]) -> None:
    """Answer lines of JSON on standard input with exit statuses on standard output, until the input ends."""
    for name in modules:
        importlib.import_module(name)
    draw()
    compile_kernels()  # reads what numba has kept; its loops start no threads
    gc.freeze()
    answers = os.fdopen(os.dup(1), "w")
    while line := sys.stdin.readline():
        asked = json.loads(line)
        child = os.fork()
        if child == 0:
            answers.close()
            become(asked)
        answers.write(json.dumps(wait(child, time.monotonic() + asked["timeout"])) + "\n")
        answers.flush()


if __name__ == "__main__":
    serve(sys.argv[1:])
