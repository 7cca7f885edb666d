"""The progress bar that every long step shows: bytes, speed and time left, and nothing where no one looks."""

from typing import Any

from tqdm import tqdm


def byte_bar(label: str, total: int, quiet: bool) -> "tqdm[Any]":
    """Return a bar over bytes; tqdm keeps it silent where standard error is no terminal, ``quiet`` everywhere."""
    return tqdm(total=total, desc=label, unit="B", unit_scale=True, disable=True if quiet else None)
