"""The license that a source comes with, as its model card states it."""

import re
from dataclasses import dataclass
from pathlib import Path

import yaml
from huggingface_hub import metadata_load

from ..file_names import CARD

_LINK = re.compile(r"https?://[^\s<>\"]+|[\w.-]+")  # an address, or a file of the repository
_LONGEST = 1 << 20  # bytes of a card
_NON_COMMERCIAL = ("-nc", "noncommercial", "non-commercial", "non commercial", "research-only", "academic")


@dataclass(frozen=True)
class License:
    """A license in the Hub's terms. name, link: of one that the Hub has no id for (``other``)."""

    license: str
    license_name: str | None = None
    license_link: str | None = None

    @property
    def title(self) -> str:
        """What people call it."""
        return self.license_name or self.license

    @property
    def non_commercial(self) -> bool:
        """Whether its name says that commercial use is not allowed."""
        return any(word in f"{self.license} {self.title}".lower() for word in _NON_COMMERCIAL)

    @property
    def of_nvidia(self) -> bool:
        """Whether it is the NVIDIA Open Model License, which asks for a notice."""
        return "nvidia-open-model" in self.title.lower().replace(" ", "-")


NVIDIA = License(
    "other",
    "nvidia-open-model-license",
    "https://www.nvidia.com/en-us/agreements/enterprise-software/nvidia-open-model-license/",
)
OWN = License("mit")  # of the demo, which the toolkit makes itself
UNKNOWN = License("unknown")


def license_of(folder: Path) -> License | None:
    """Return the license that the card in a source's folder states, None if there is no card or it states none."""
    try:
        if not (folder / CARD).is_file() or (folder / CARD).stat().st_size > _LONGEST:
            return None
        data = metadata_load(folder / CARD) or {}
    except (OSError, ValueError, RecursionError, yaml.YAMLError):
        return None
    return from_json(data)


def from_json(data: object) -> License | None:
    """Return a license from a card's or a manifest's fields, None where they hold none that can be printed."""
    if not isinstance(data, dict):
        return None
    keys = ("license", "license_name", "license_link")
    values = [data.get(key) for key in keys]
    plain = [v if isinstance(v, str) and 0 < len(v) <= 300 and v.isprintable() else None for v in values]
    link = plain[2] if plain[2] and _LINK.fullmatch(plain[2]) else None
    return License(plain[0], plain[1], link) if plain[0] else None
