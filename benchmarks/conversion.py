"""Time and memory of a whole conversion of the full-size demo, beside a plain copy of the same bytes in the same run.

    python benchmarks/conversion.py [--rounds 3] [--methods rtn lsq] [--folder DIR]

Each round reads the source and writes the bundle's number of bytes (with fsync), then runs ``ppx-convert`` as a process
of its own for each method; all begin with the files they read out of the page cache. Prints the median of each figure
and of its ratio to the copy of the same round. Memory is the largest ``ru_maxrss`` of the process, which counts
file-backed pages too, less that of a Python that imports the same modules and does nothing. Needs 23 GB of disk.
"""

import argparse
import os
import platform
import shutil
import statistics
import subprocess
import sys
import time
from pathlib import Path

from ppx.convert import demo
from ppx.convert.parallel import cores

BLOCK = 8 << 20
IMPORTS = "import ppx.recipes.convert_program, torch"


def evict(folder: Path) -> None:
    """Drop a folder's files from the page cache, where the system lets us."""
    for path in (p for p in folder.rglob("*") if p.is_file() and hasattr(os, "posix_fadvise")):
        descriptor = os.open(path, os.O_RDONLY)
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(descriptor)


def plain_copy(source: Path, target: Path, nbytes: int) -> tuple[float, float]:
    """Read all of a source, then write some bytes and flush them; return the seconds of each."""
    start = time.perf_counter()
    buffer = bytearray(BLOCK)
    for path in sorted(source.iterdir()):
        with path.open("rb", buffering=0) as file:
            while file.readinto(buffer):
                pass
    between = time.perf_counter()
    with target.open("wb", buffering=0) as file:
        left = nbytes
        while left:
            left -= file.write(memoryview(buffer)[: min(left, BLOCK)]) or 0
        os.fsync(file.fileno())
    end = time.perf_counter()
    target.unlink()
    return between - start, end - between


def run(command: list[str]) -> tuple[float, int]:
    """Run a command; return its seconds and its largest resident memory in bytes."""
    start = time.perf_counter()
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    _, status, usage = os.wait4(process.pid, 0)
    seconds = time.perf_counter() - start
    if status:
        raise SystemExit(f"{' '.join(command)} ended with {status}")
    return seconds, usage.ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def main() -> None:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--methods", nargs="+", default=["rtn", "lsq"])
    parser.add_argument(
        "--folder", type=Path, default=Path("benchmark-conversion"), help="for bundles, made and removed"
    )
    options = parser.parse_args()
    source = demo.cached("demo:7b")
    options.folder.mkdir()
    try:
        figures = measure(source, options.folder, options.methods, options.rounds)
    finally:
        shutil.rmtree(options.folder)
    print(f"\n{platform.system()} {platform.machine()}, {cores()} cores, medians of {options.rounds} rounds")
    print(f"{'':<12}{'seconds':>9}{'/ copy':>8}{'peak memory above imports':>28}")
    for name, rows in figures.items():
        seconds, ratio, memory = (statistics.median(row[place] for row in rows) for place in range(3))
        print(f"{name:<12}{seconds:>9.1f}{ratio:>8.2f}" + (f"{memory / 2**30:>24.2f} GiB" if memory else ""))


def measure(source: Path, folder: Path, methods: list[str], rounds: int) -> dict[str, list[tuple[float, float, float]]]:
    """Return (seconds, ratio to the copy, peak memory above imports) of each round, for the copy and each method."""
    _, imports = run([sys.executable, "-c", IMPORTS])
    print(f"Python with its imports: {imports / 2**30:.2f} GiB")
    figures: dict[str, list[tuple[float, float, float]]] = {"plain copy": []}
    target = folder / "bundle"
    for number in range(rounds):
        results = {}
        for method in methods:
            evict(source)
            command = [sys.executable, "-m", "ppx.recipes.convert_program", "demo:7b", "--bits", "4", "--no-verify"]
            results[method] = run([*command, "--group-size", "64", "--method", method, "--output", str(target)])
            nbytes = sum(path.stat().st_size for path in target.rglob("*") if path.is_file())
            shutil.rmtree(target)
        evict(source)
        read, write = plain_copy(source, folder / "copy", nbytes)
        figures["plain copy"].append((read + write, 1.0, 0.0))
        print(f"round {number + 1}: {nbytes / 1e9:.2f} GB bundle; copy: read {read:.1f} s, write {write:.1f} s", end="")
        for method, (seconds, memory) in results.items():
            figures.setdefault(method, []).append((seconds, seconds / (read + write), float(memory - imports)))
            print(f"; {method} {seconds:.1f} s", end="")
        print(flush=True)
    return figures


if __name__ == "__main__":
    main()
