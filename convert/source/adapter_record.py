"""What is recorded of an adapter that was merged."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, Self


@dataclass(frozen=True)
class AdapterRecord:
    """A LoRA adapter that was merged into a source.

    id: its Hub id or file name. revision: the commit on the Hub, None for a file. merged: names of the tensors.
    """

    id: str
    revision: str | None
    rank: int
    scaling: float
    size: int
    sha256: str
    merged: tuple[str, ...]

    def to_json(self) -> dict[str, Any]:
        """Return it as a manifest holds it."""
        return asdict(self) | {"merged": list(self.merged)}

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Self:
        """Return the record in a manifest that was checked."""
        return cls(**{field: data[field] for field in cls.__annotations__} | {"merged": tuple(data["merged"])})
