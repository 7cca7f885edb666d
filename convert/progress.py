"""The progress bars that every long step shows: amount, speed and time left, and nothing where no one looks."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from tqdm import tqdm


def byte_bar(label: str, total: int, quiet: bool) -> "tqdm[Any]":
    """Return a bar over bytes; tqdm keeps it silent where standard error is no terminal, ``quiet`` everywhere."""
    return bar(label, total, "B", quiet)


def bar(label: str, total: int, unit: str, quiet: bool) -> "tqdm[Any]":
    """Return a bar over anything; bytes (``B``) are shown with their thousands."""
    return tqdm(total=total, desc=label, unit=unit, unit_scale=unit == "B", disable=True if quiet else None)


@contextmanager
def long_step(label: str, total: int, unit: str, silent: bool) -> Iterator["tqdm[Any]"]:
    """Show what is being waited for: a bar on a terminal, elsewhere one line on standard error; nothing if silent."""
    if not silent and sys.stderr is not None and not sys.stderr.isatty():
        sys.stderr.write(f"{label}: this can take a minute\n")
        sys.stderr.flush()
    with bar(label, total, unit, silent) as progress:
        yield progress
