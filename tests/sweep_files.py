"""Sweeps of pico for tests, and what they leave."""

import csv
import re
from pathlib import Path

EVALUATION = '[evaluation]\ntokens = "PICO/heldout_tokens.safetensors"\nsequences = 1\nframes = 24\n'
TWO = '[[sources]]\nname = "pico"\nsource = "PICO"\n[[recipes]]\nbits = 4\n[[recipes]]\nbits = 3\n' + EVALUATION
RECIPES = TWO.replace("bits = 3\n", "bits = 3\n[[recipes]]\nbits = 5\n")


def written(folder: Path, text: str, pico: Path) -> Path:
    """Write a sweep; PICO in it is the folder of pico."""
    file = folder / "sweep.toml"
    file.write_text(text.replace("PICO", str(pico.resolve())))
    return file


def untimed(folder: Path) -> dict[str, bytes]:
    """What a sweep leaves, by name, without times; Parquet holds the same as the CSV, times included."""
    left = {}
    for path in sorted(path for path in folder.rglob("*") if path.is_file()):
        name = path.relative_to(folder).as_posix()
        if name.startswith("work/") or path.name in ("results.parquet", "report.html", "report.md", ".sweep"):
            continue  # the report's pages are rendered from its JSON
        data = path.read_bytes()
        if path.suffix == ".json":
            data = re.sub(rb'"(began|seconds)": [^\n]*', b"", data)
        elif path.suffix == ".csv":
            data = re.sub(rb",[^,\n]*,[^,\n]*$", b"", data, flags=re.MULTILINE)
        left[name] = data
    return left


def rows_of(results: Path) -> list[dict[str, str]]:
    """The rows of a sweep's CSV."""
    with (results / "results.csv").open(newline="") as file:
        return list(csv.DictReader(file))
