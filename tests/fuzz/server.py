"""Runs a program in a fork of this process, within bounds, and says how it ended.

The slow libraries are imported before the forks; nothing is computed with them here, as their threads don't survive.
"""

import gc
import importlib
import io
import os
import re
import resource
import signal
import sys
import time
import traceback
from contextlib import redirect_stderr, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.append(str(Path(__file__).parent.parent))  # where the tests' other helpers are
from program_server import wait

LIBRARIES = ("jinja2", "matplotlib.figure", "matplotlib.backends.backend_svg", "mlx.core", "numba", "torch", "typer")
MODULES = (
    *("allocate", "bench", "calibrate", "convert", "inspect", "publish", "speak", "verify"),
    *("rustymimi", "sentencepiece", "soundfile", "soxr"),
)
LAZY = (  # what the programs import only when they need it
    "calibrate.dataset",
    "calibrate.layerwise",
    "calibrate.self_generated",
    "speak.benchmark",
    "speak.recordings",
    "speak.speaker",
    "verify.verification",
)
MEMORY = 768 << 20  # bytes that a program may take above what it has at its fork
ADDRESSES = 6 << 30  # bytes of address space above that: what is past it ends in an error at once
SECONDS = 60.0
_TRACEBACK, _OUTSIDE = 97, 96
_CONTROL = re.compile(rb"[\x00-\x08\x0b-\x1f\x7f]|\xc2[\x80-\x9f]")
_WRITES = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND
_CHANGES = {"os.remove", "os.rename", "os.rmdir", "os.mkdir", "os.link", "os.symlink", "os.truncate", "os.chmod"}
_RUNS = ("os.system", "os.exec", "os.posix_spawn", "subprocess.Popen", "socket.connect", "pty.spawn")

GOOD = ("clean error", "accepted")
BAD = ("traceback", "crash", "hang", "memory", "outside", "escape")


@dataclass(frozen=True)
class Command:
    """A program and its arguments. status: exit statuses that are expected of it."""

    program: str
    arguments: tuple[str, ...]


@dataclass(frozen=True)
class Ending:
    """How a program ended: one of GOOD or BAD. detail: what it said. memory: bytes above what it began with."""

    kind: str
    detail: str
    memory: int
    seconds: float


class _Terminal(io.TextIOWrapper):
    """Standard output that says it is a terminal: else typer takes escape sequences out, and none would be seen."""

    def __init__(self, number: int, mode: str) -> None:
        super().__init__(io.FileIO(number, mode))

    def isatty(self) -> bool:
        return True


def preload() -> None:
    """Import what the programs import."""
    for name in LIBRARIES:
        importlib.import_module(name)
    for name in MODULES:
        importlib.import_module(name if name in MODULES[8:] else f"ppx.recipes.cli.{name}")
    for name in (
        "speak.speaker",
        "speak.benchmark",
        "speak.recordings",
        "calibrate.dataset",
        "calibrate.self_generated",
    ):
        importlib.import_module(f"ppx.{name}")
    for name in ("calibrate.layerwise", "verify.verification"):
        importlib.import_module(f"ppx.{name}")
    with redirect_stderr(io.StringIO()), suppress(SystemExit):  # typer imports pydantic when it reads its first option
        importlib.import_module("ppx.recipes.cli.convert").app(["./nothing", "--bits", "4", "--dry-run"])
    gc.collect()
    gc.freeze()


def run(command: Command, folder: Path, allowed: tuple[Path, ...], seconds: float = SECONDS) -> Ending:
    """Run a program in a folder; it may write there and below ``allowed``, and nowhere else."""
    began = time.monotonic()
    child, reading = begin(command, folder, (folder, *allowed))
    status = wait(child, began + seconds)
    told = os.read(reading, 64)  # bytes above the beginning
    os.close(reading)
    out, err = ((folder / name).read_bytes() for name in (".out", ".err"))
    memory = int(told or 0)
    kind, detail = _judge(status, out, err, memory)
    return Ending(kind, detail, memory, time.monotonic() - began)


def begin(command: Command, folder: Path, allowed: tuple[Path, ...]) -> tuple[int, int]:
    """Start a program in a folder; return its process, and a descriptor that tells the memory it took.

    Its output goes to the files ``.out`` and ``.err`` of the folder.
    """
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(reading)
        _become(command, folder, allowed, [folder / ".out", folder / ".err"], writing)
    os.close(writing)
    return child, reading


def _judge(status: int | None, out: bytes, err: bytes, memory: int) -> tuple[str, str]:
    last = (err.decode("utf-8", "replace").strip().splitlines() or [""])[-1][:300]
    if status is None:
        return "hang", last
    if status == _OUTSIDE:
        return "outside", err.decode("utf-8", "replace")[-600:]
    if status < 0:
        return "crash", f"{signal.Signals(-status).name}: {last}"
    if memory > MEMORY or b"MemoryError" in err or b"bad_alloc" in err:
        return "memory", f"{memory >> 20} MiB: {err.decode('utf-8', 'replace')[-1500:]}"
    if status not in (0, 1, 2) or b"Traceback (most recent call last)" in out + err:
        return "traceback", err.decode("utf-8", "replace")[-3000:]
    if _CONTROL.search(out.replace(b"\n", b"")) or _CONTROL.search(err.replace(b"\n", b"")):
        return "escape", ascii((out + err)[:600])
    if status and not last.strip():
        return "traceback", f"exit status {status} without a word"
    return ("clean error", last) if status else ("accepted", "")


def _become(command: Command, folder: Path, allowed: tuple[Path, ...], streams: list[Path], told: int) -> None:
    """Turn a forked process into the program, until it ends."""
    os.setsid()
    for number, path in enumerate(streams, 1):
        os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), number)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    sys.stdin, sys.stdout, sys.stderr = os.fdopen(0), _Terminal(1, "w"), os.fdopen(2, "w", buffering=1)
    os.chdir(folder)
    signal.signal(signal.SIGINT, signal.default_int_handler)  # which shells let background processes ignore
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    sys.argv = [command.program, *command.arguments]
    Path("/proc/self/clear_refs").write_text("5")
    held, addresses = _memory("VmRSS"), _memory("VmSize")
    resource.setrlimit(resource.RLIMIT_AS, (addresses + ADDRESSES,) * 2)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2 << 30,) * 2)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    try:
        module: Any = importlib.import_module(f"ppx.recipes.cli.{command.program}")
        roots = tuple(os.path.realpath(path) + os.sep for path in (*allowed, *_compiled()))
        sys.addaudithook(lambda event, arguments: _watch(event, arguments, roots))
        status = _call(module, command)
    except BaseException:  # also what the watch raises: everything must be seen
        traceback.print_exc()
        status = _TRACEBACK
    sys.stdout.flush()
    sys.stderr.flush()
    os.write(told, str(max(0, _memory("VmHWM") - held)).encode())
    os._exit(status)


def _compiled() -> list[Path]:
    """Return where numba keeps what it compiles: that of a fresh clone is not there yet."""
    kernels: Any = importlib.import_module("ppx.quant.kernels")
    chosen = os.environ.get("NUMBA_CACHE_DIR")
    return [Path(kernels.__file__).parent / "__pycache__", *([Path(chosen)] if chosen else [])]


def _call(module: Any, command: Command) -> int:
    try:
        module.app(list(command.arguments), prog_name=f"ppx-{command.program}")
    except SystemExit as end:
        return end.code if isinstance(end.code, int) else 0 if end.code is None else 1
    return 0


def _memory(key: str) -> int:
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(key))
    return 1024 * int(line.split()[1])


def _watch(event: str, arguments: tuple[Any, ...], roots: tuple[str, ...]) -> None:
    """End the program where it writes outside of its folders, runs another, or goes to the network."""
    if event == "open":
        path, _, flags = arguments
        if not isinstance(flags, int) or not flags & _WRITES or isinstance(path, int):
            return
        paths = [path]
    elif event in _CHANGES:
        paths = [path for path in arguments if isinstance(path, str | bytes | os.PathLike)]
        if event == "os.symlink":
            paths = paths[1:]
    elif event.startswith(_RUNS):
        paths = [f"<{event} {str(arguments)[:200]}>"]
    else:
        return
    for path in paths:
        real = os.path.realpath(os.fsdecode(path))
        if real != os.devnull and not (real + os.sep).startswith(roots):
            os.write(2, f"{event} {real!a}\n{''.join(traceback.format_stack(limit=12))}".encode())
            os._exit(_OUTSIDE)
