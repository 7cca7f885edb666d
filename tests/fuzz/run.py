"""Feeds the programs damaged sources, bundles, recipes, token files, recordings and adapters, and counts how they end.

    python tests/fuzz/run.py --cases 2000 --seed 1 [--kind sources] [--jobs 2] [--deep 0.3]
    python tests/fuzz/run.py --seed 1 --case 1234 --keep /tmp/case

The second line runs one case again, and leaves its files. A program may end in an error of its own (exit status 1 or 2,
and a line), or accept what it is given. Everything else fails: a traceback, a crash, more than 60 s, more than 768 MiB
above what it began with, a file written or a program started outside of its folder, a control character in its output.
"""

import argparse
import json
import os
import shutil
import sys
import tempfile
import time
import traceback
from collections import Counter
from dataclasses import asdict
from pathlib import Path
from random import Random

import base as bases
from cases import KINDS, kind_of
from server import BAD, GOOD, Command, Ending, preload, run


def one(number: int, options: argparse.Namespace, base: bases.Base, work: Path) -> list[tuple[Command, Ending]]:
    """Run one case in a folder of its own; return its programs with their endings, up to the first that fails."""
    kind = kind_of(number, options.kind)
    random = Random(f"{options.seed}:{kind}:{number}")
    folder = work / f"case-{number}"
    folder.mkdir()
    found = []
    for command in KINDS[kind][0](random, base, folder, options.deep):
        ending = run(command, folder, (work / "cache",))
        found.append((command, ending))
        if ending.kind != "accepted":
            break
    return found


def leave(number: int, options: argparse.Namespace, base: bases.Base, work: Path) -> None:
    """Run one case, and leave its result in a file."""
    try:
        result = [(asdict(command), asdict(ending)) for command, ending in one(number, options, base, work)]
    except Exception:
        broken = Ending("crash", traceback.format_exc(), 0, 0.0)
        result = [({"program": "the fuzzer", "arguments": []}, asdict(broken))]
    (work / f"case-{number}.json").write_text(json.dumps(result))


def start(number: int, options: argparse.Namespace, base: bases.Base, work: Path) -> int:
    """Run a case in a fork; return its process."""
    child = os.fork()
    if child == 0:
        leave(number, options, base, work)
        os._exit(0)
    return child


def finish(number: int, options: argparse.Namespace, work: Path, counts: dict[str, Counter[str]]) -> bool:
    """Count a case's result, and tell about it if it is bad; return whether it is good."""
    file = work / f"case-{number}.json"
    result = json.loads(file.read_text())
    file.unlink()
    kind = kind_of(number, options.kind)
    command, ending = result[-1]
    counts[kind][ending["kind"]] += 1
    counts[kind]["MiB"] = max(counts[kind]["MiB"], *(one["memory"] >> 20 for _, one in result))
    bad = ending["kind"] in BAD
    if bad or options.case is not None or options.verbose:
        for command, one in result:
            words = " ".join([f"ppx-{command['program']}", *command["arguments"]])
            print(f"case {number} ({kind}): {words!a}: {one['kind']} in {one['seconds']:.1f} s: {one['detail']}")
        if bad:
            only = f" --kind {options.kind}" if options.kind else ""
            print(f"again: python tests/fuzz/run.py --seed {options.seed} --case {number}{only} --deep {options.deep}")
        sys.stdout.flush()
    if options.keep:
        shutil.move(work / f"case-{number}", options.keep)
    shutil.rmtree(work / f"case-{number}", ignore_errors=True)
    return not bad


def fuzz(options: argparse.Namespace, work: Path) -> bool:
    """Run all cases; return whether none was bad."""
    cache = work / "cache"
    cache.mkdir()
    os.environ |= {"XDG_CACHE_HOME": str(cache), "HF_HOME": str(cache / "hub"), "HF_HUB_OFFLINE": "1"}
    os.environ |= {"TMPDIR": str(cache), "MPLCONFIGDIR": str(cache / "mpl"), "OMP_NUM_THREADS": "1"}
    os.environ.pop("HF_TOKEN", None)
    tempfile.tempdir = None
    preload()
    (work / "base").mkdir()
    base = bases.make(work / "base", cache, options.codec)
    untouched = _state(work / "base")
    counts: dict[str, Counter[str]] = {kind: Counter() for kind in KINDS}
    numbers = iter([options.case] if options.case is not None else range(options.cases))
    running: dict[int, int] = {}
    good, began = True, time.monotonic()
    for number in numbers if options.jobs == 1 else ():
        leave(number, options, base, work)
        good &= finish(number, options, work, counts)
    while True:
        while len(running) < options.jobs and (number := next(numbers, None)) is not None:
            running[start(number, options, base, work)] = number
        if not running:
            break
        child, _ = os.wait()
        good &= finish(running.pop(child), options, work, counts)
    if _state(work / "base") != untouched:
        print("files of the base changed: a program wrote outside of its folder")
        good = False
    _table(counts, time.monotonic() - began)
    return good


def _state(folder: Path) -> dict[str, tuple[int, int]]:
    return {str(path): (path.stat().st_size, path.stat().st_mtime_ns) for path in folder.rglob("*") if path.is_file()}


def _table(counts: dict[str, Counter[str]], seconds: float) -> None:
    names = (*GOOD, *BAD, "MiB")
    print(f"{'':<10}{'cases':>7}" + "".join(f"{name:>13}" for name in names))
    total: Counter[str] = Counter()
    for kind, counted in counts.items():
        cases = sum(counted[name] for name in names[:-1])
        if cases:
            print(f"{kind:<10}{cases:>7}" + "".join(f"{counted[name]:>13}" for name in names))
            total.update({name: counted[name] for name in names[:-1]})
            total["MiB"] = max(total["MiB"], counted["MiB"])
    cases = sum(total[name] for name in names[:-1])
    print(f"{'all':<10}{cases:>7}" + "".join(f"{total[name]:>13}" for name in names) + f"   in {seconds:.0f} s")


def main() -> None:
    """Run from the command line; exit status 1 if a case was bad."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", type=int, default=200)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--kind", choices=KINDS)
    parser.add_argument("--jobs", type=int, default=1)
    parser.add_argument("--deep", type=float, default=0.3, help="share of cases that also convert, verify or time")
    parser.add_argument("--case", type=int, help="run just this one again")
    parser.add_argument("--keep", type=Path, help="leave the case's files there")
    parser.add_argument("--codec", type=Path, help="whole weights of Mimi, so that sessions get past the small one")
    parser.add_argument("--verbose", action="store_true")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="ppx-fuzz-") as folder:
        good = fuzz(options, Path(folder))
    sys.exit(0 if good else 1)


if __name__ == "__main__":
    main()
