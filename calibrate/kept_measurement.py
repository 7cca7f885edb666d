"""What is measured so far, on the disk: a measurement that was interrupted or killed resumes from it."""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Self

from ..convert.bundle.workspace import write_durably
from ..convert.regular_files import read_json
from .sensitivity import STREAMS

_VERSION = 1
_LARGEST = 1 << 26  # bytes of a file
Sums = dict[str, float]  # by stream


@dataclass(frozen=True)
class MeasuredUnit:
    """Some groups, measured on the sequences of one pass.

    counts: rows of predictions, by stream. costs: divergences, summed over rows, by group (as text) and bits.
    """

    counts: dict[str, int]
    costs: dict[str, dict[str, Sums]]

    @classmethod
    def from_json(cls, data: Any) -> Self:
        """Return the unit in parsed JSON; raises ValueError, LookupError, TypeError or AttributeError for others."""
        counts = {stream: int(data["counts"][stream]) for stream in STREAMS}
        costs = {
            str(group): {str(bits): {stream: float(sums[stream]) for stream in STREAMS} for bits, sums in of.items()}
            for group, of in data["costs"].items()
        }
        values = [value for of in costs.values() for sums in of.values() for value in sums.values()]
        if min(counts.values()) < 0 or not all(map(math.isfinite, values)):
            raise ValueError("not a measurement")
        return cls(counts, costs)


@dataclass
class KeptMeasurement:
    """The units of a measurement that are done. path: its file, None for nothing. mark: of all that decides them."""

    path: Path | None
    mark: str
    units: dict[str, MeasuredUnit] = field(default_factory=dict)

    @classmethod
    def open(cls, path: Path | None, mark: str) -> Self:
        """Return what an earlier run left in a file; nothing of another measurement, or of a damaged file."""
        kept = cls(path, mark)
        if path is None or not path.exists():
            return kept
        try:
            data = read_json(path, _LARGEST)
            if (data["measured"], data["mark"]) == (_VERSION, mark):
                kept.units = {str(name): MeasuredUnit.from_json(unit) for name, unit in data["units"].items()}
        except (OSError, ValueError, LookupError, TypeError, AttributeError, RecursionError):
            kept.units = {}
        return kept

    def has(self, name: str, groups: Sequence[str], bits: Sequence[int]) -> bool:
        """Tell whether a unit of these groups, at these bits, is done."""
        unit = self.units.get(name)
        return unit is not None and all(set(unit.costs.get(group, {})) == set(map(str, bits)) for group in groups)

    def add(self, name: str, counts: Mapping[str, int], costs: dict[str, dict[str, Sums]]) -> None:
        """Add a unit, and write the file: whole or not at all."""
        self.units[name] = MeasuredUnit(dict(counts), costs)
        if self.path:
            units = {name: asdict(unit) for name, unit in self.units.items()}
            write_durably(self.path, json.dumps({"measured": _VERSION, "mark": self.mark, "units": units}))
