"""Time and memory of a whole conversion of the full-size demo, beside a plain copy of the same bytes in the same run.

    python benchmarks/conversion.py [--rounds 3] [--methods rtn lsq] [--folder DIR]

Each round runs ``ppx-convert`` for each method, then reads the source and writes the bundle's number of bytes (with
fsync), each as a process of its own; all begin with the files they read out of the page cache. Prints the median of
each figure and of its ratio to the copy of the same round. Memory is the largest ``ru_maxrss`` of the process, which
counts file-backed pages too, less that of a Python that imports the same modules and does nothing. Needs 23 GB of disk.
"""

import argparse
import json
import os
import platform
import shutil
import statistics
import sys
import time
from pathlib import Path

from ppx.convert.parallel import cores
from ppx.convert.source import demo
from processes import run

BLOCK = 8 << 20
Figures = tuple[float, float, float]  # seconds, ratio to the copy, peak memory above imports in bytes
IMPORTS = "import ppx.recipes.cli.convert, torch"


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


def main() -> None:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--methods", nargs="+", default=["rtn", "lsq"])
    parser.add_argument("--source", choices=demo.SIZES, default=demo.FULL_SIZE, help="a small one tries the benchmark")
    parser.add_argument(
        "--folder", type=Path, default=Path("benchmark-conversion"), help="for bundles, made and removed"
    )
    parser.add_argument("--copy", nargs=3, metavar=("FOLDER", "FILE", "BYTES"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.copy:
        folder, file, nbytes = options.copy
        print(json.dumps(plain_copy(Path(folder), Path(file), int(nbytes))))
        return
    source = demo.cached(options.source)
    options.folder.mkdir()
    try:
        figures = measure(options.source, source, options.folder, options.methods, options.rounds)
    finally:
        shutil.rmtree(options.folder)
    print(f"\n{platform.system()} {platform.machine()}, {cores()} cores, medians of {options.rounds} rounds")
    print(table(figures))


def table(figures: dict[str, list[Figures]]) -> str:
    """Return the medians of what was measured."""
    lines = [f"{'':<12}{'seconds':>9}{'/ copy':>8}{'peak memory above imports':>28}"]
    for name, rows in figures.items():
        seconds, ratio, memory = (statistics.median(row[place] for row in rows) for place in range(3))
        lines.append(f"{name:<12}{seconds:>9.1f}{ratio:>8.2f}{memory / 2**30:>z24.2f} GiB")
    return "\n".join(lines)


def measure(identity: str, source: Path, folder: Path, methods: list[str], rounds: int) -> dict[str, list[Figures]]:
    """Return the figures of each round, for the copy and for each method."""
    copier = [sys.executable, __file__, "--copy"]
    (folder / "empty").mkdir()
    imports = run([sys.executable, "-c", IMPORTS]).memory
    idle = run([*copier, str(folder / "empty"), str(folder / "copy"), "0"]).memory
    print(f"Python with its imports: {imports / 2**30:.2f} GiB")
    figures: dict[str, list[Figures]] = {"plain copy": []}
    target = folder / "bundle"
    for number in range(rounds):
        results = {}
        for method in methods:
            evict(source)
            command = [sys.executable, "-m", "ppx.recipes.cli.convert", identity, "--bits", "4", "--no-verify"]
            results[method] = run([*command, "--group-size", "64", "--method", method, "--output", str(target)])
            nbytes = sum(path.stat().st_size for path in target.rglob("*") if path.is_file())
            shutil.rmtree(target)
        evict(source)
        copied = run([*copier, str(source), str(folder / "copy"), str(nbytes)])
        read, write = json.loads(copied.output)
        figures["plain copy"].append((read + write, 1.0, float(copied.memory - idle)))
        print(f"round {number + 1}: {nbytes / 1e9:.2f} GB bundle; copy: read {read:.1f} s, write {write:.1f} s", end="")
        for method, done in results.items():
            ratio, memory = done.seconds / (read + write), float(done.memory - imports)
            figures.setdefault(method, []).append((done.seconds, ratio, memory))
            print(f"; {method} {done.seconds:.1f} s", end="")
        print(flush=True)
    return figures


if __name__ == "__main__":
    main()
