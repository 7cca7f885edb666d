"""The same 24 cells in one process and on a local Ray cluster with as many workers as cores.

    python benchmarks/sweep.py [--source tests/data/pico] [--cells 24] [--frames 24] [--folder DIR]

Prints seconds, the speed-up, what Ray adds to a cell, and peak memory as ratios. A run with Ray counts its start. What
Ray adds to a cell is the workers' time (seconds of the run times workers) beyond the sum of the cells' own times there.
Memory is the largest sum of the proportional set sizes of a run's processes (Linux), sampled twice a second.
"""

import argparse
import csv
import os
import shutil
import subprocess
import sys
import threading
import time
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

from ppx.convert.parallel import cores

PICO = Path(__file__).parent.parent / "tests" / "data" / "pico"
BITS, GROUPS, METHODS = (2, 3, 4, 5, 6, 8), (32, 64), ("rtn", "mse")


@dataclass(frozen=True)
class Run:
    """A sweep that ended. cells: seconds of each, in its own process. memory: bytes at most, of all its processes."""

    seconds: float
    cells: list[float]
    memory: int


def sweep_file(source: Path, cells: int, frames: int) -> str:
    """Return a sweep of so many cells, all of one source."""
    pairs = [(bits, size) for bits in BITS for size in GROUPS][: max(1, cells // len(METHODS))]
    lines = [f"methods = {list(METHODS)}", "[[sources]]", f'name = "source"\nsource = "{source.resolve()}"']
    for bits, size in pairs:
        lines += ["[[recipes]]", f'bits = {bits}\ngroup_size = {size}\ntarget = "mlx"']
    tokens = source.resolve() / "heldout_tokens.safetensors"
    lines += ["[evaluation]", f'tokens = "{tokens}"\nsequences = 1\nframes = {frames}']
    return "\n".join(lines) + "\n"


def memory_of(group: int) -> int:
    """Return the proportional set size of a session's processes, in bytes."""
    total = 0
    for folder in Path("/proc").iterdir():
        with suppress(OSError, ValueError, IndexError):  # processes end
            session = int((folder / "stat").read_text().rpartition(")")[2].split()[3])
            marked = f"PPX_SWEEP_BENCHMARK={group}".encode() in (folder / "environ").read_bytes().split(b"\0")
            if session == group or marked:
                pss = [line for line in (folder / "smaps_rollup").read_text().splitlines() if line.startswith("Pss:")]
                total += int(pss[0].split()[1]) * 1024
    return total


def run(file: Path, results: Path, *options: str) -> Run:
    """Run the program once; raises SystemExit if a cell fails."""
    mark = time.monotonic_ns()
    command = [sys.executable, "-m", "ppx.recipes.cli.sweep", str(file), "--output", str(results), *options]
    environment = os.environ | {"PPX_SWEEP_BENCHMARK": str(mark), "OMP_NUM_THREADS": "1"}
    peak, ended = [0], threading.Event()

    def sample() -> None:
        while not ended.wait(0.5):
            peak[0] = max(peak[0], memory_of(mark))

    thread = threading.Thread(target=sample)
    thread.start()
    start = time.perf_counter()
    done = subprocess.run(command, env=environment, stdout=subprocess.DEVNULL)
    seconds = time.perf_counter() - start
    ended.set()
    thread.join()
    if done.returncode:
        raise SystemExit(f"{' '.join(command)} ended with {done.returncode}")
    with (results / "results.csv").open(newline="") as table:
        return Run(seconds, [float(row["seconds"]) for row in csv.DictReader(table)], peak[0])


def text(alone: Run, on_ray: Run, workers: int) -> str:
    """Return what is printed of both."""
    count = len(alone.cells)
    added = (on_ray.seconds * workers - sum(on_ray.cells)) / count
    lines = [
        f"{count} cells; Ray with {workers} workers of one core",
        f"one process  {alone.seconds:7.1f} s  {alone.memory / 2**30:5.2f} GiB",
        f"Ray          {on_ray.seconds:7.1f} s  {on_ray.memory / 2**30:5.2f} GiB",
        f"speed-up {alone.seconds / on_ray.seconds:.2f}",
        f"Ray adds {added:.2f} s of a worker to a cell, its start included",
        f"a cell takes {sum(on_ray.cells) / sum(alone.cells):.2f} times its time alone",
    ]
    if alone.memory:
        lines.append(f"memory {on_ray.memory / alone.memory:.2f} times that of one process")
    return "\n".join(lines)


def main() -> None:
    """Measure both, and print it."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", maxsplit=1)[0])
    parser.add_argument("--source", type=Path, default=PICO)
    parser.add_argument("--cells", type=int, default=len(BITS) * len(GROUPS) * len(METHODS))
    parser.add_argument("--frames", type=int, default=24)
    parser.add_argument("--folder", type=Path, help="where results stay")
    given = parser.parse_args()
    with TemporaryDirectory() as temporary:
        folder = given.folder or Path(temporary)
        folder.mkdir(parents=True, exist_ok=True)
        file = folder / "sweep.toml"
        file.write_text(sweep_file(given.source, given.cells, given.frames))
        for name in ("alone", "ray"):
            shutil.rmtree(folder / name, ignore_errors=True)
        os.environ.pop("RAY_ADDRESS", None)
        alone = run(file, folder / "alone")
        on_ray = run(file, folder / "ray", "--ray", "auto")
        print(text(alone, on_ray, cores()))


if __name__ == "__main__":
    main()
