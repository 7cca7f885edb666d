"""Inclusive ranges of layer and step numbers, as recipes write them: ``0-3,31``."""

import re
from collections.abc import Iterable

Ranges = tuple[tuple[int, int], ...]  # (first, last), both included


def ranges_of(numbers: Iterable[int]) -> Ranges:
    """Return the fewest ranges, in ascending order, that cover exactly these numbers."""
    found: list[tuple[int, int]] = []
    for number in sorted(numbers):
        if found and number == found[-1][1] + 1:
            found[-1] = (found[-1][0], number)
        else:
            found.append((number, number))
    return tuple(found)


def format_ranges(ranges: Ranges) -> str:
    """Return ranges as text: ``((0, 3), (31, 31))`` is ``0-3,31``."""
    return ",".join(f"{first}" if first == last else f"{first}-{last}" for first, last in ranges)


def parse_ranges(text: str) -> Ranges:
    """Return the ranges that a text names, in its order; raises ValueError with the reason if it names none."""
    parts = re.findall(r"(\d{1,4})(?:-(\d{1,4}))?", text)
    written = ",".join(f"{first}-{last}" if last else first for first, last in parts)
    if not parts or written != text.replace(" ", ""):
        raise ValueError('write ranges such as "0-3,31"')
    ranges = tuple((int(first), int(last or first)) for first, last in parts)
    if any(first > last for first, last in ranges):
        raise ValueError("a range runs backwards")
    return ranges
