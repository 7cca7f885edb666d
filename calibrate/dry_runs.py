"""What a conversion will do, and what it takes: download, disk, memory, time. Nothing is written for it."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..convert import preparation, typed_json
from ..convert.bundle import describe
from ..convert.bundle.plan import Plan
from ..convert.bundle.recipe import Recipe
from ..convert.conversion import output_of
from ..convert.conversion_time import conversion_seconds
from ..convert.parallel import cores
from ..convert.progress import duration
from . import forecast
from .forecast import Forecast

_BANDWIDTH = 12.5e6  # bytes a second of a download: stated, not measured


@dataclass(frozen=True)
class DryRun:
    """A plan, and what it takes. download: bytes that the Hub's cache lacks. seconds: without download and data."""

    plan: Plan
    workers: int
    output: Path
    download: int
    seconds: float
    by_data: Forecast | None

    def to_json(self) -> dict[str, Any]:
        """Return it for a program to read; times in seconds."""
        summary: dict[str, Any] = typed_json.to_json(describe.summary(self.plan, self.workers))
        summary["output"] = str(self.output)
        summary |= {"download_bytes": self.download, "download_seconds": round(self.download / _BANDWIDTH, 1)}
        summary["conversion_seconds"] = round(self.seconds, 1)
        return summary | forecast.to_json(self.by_data)

    @property
    def text(self) -> str:
        """What a person reads."""
        lines = [describe.text(self.plan, self.workers)]
        if self.download:
            at = f"{duration(self.download / _BANDWIDTH)} at {8 * _BANDWIDTH / 1e6:.0f} Mbit/s"
            lines.append(f"download: {describe.size(self.download)} from the Hub, about {at}")
            both = describe.size(self.download + self.plan.free_disk)
            lines.append(f"download and bundle take {both} of disk together")
        threads = describe.counted(self.workers, "thread")
        lines.append(
            f"conversion: about {duration(self.seconds)} on this machine with {threads} and a disk of 1 GB/s; "
            "comparing it with the source at the end is not in that"
        )
        return "\n".join(lines) + forecast.line(self.by_data)


def dry_run(
    source: str | Path,
    recipe: Recipe,
    output: str | Path | None = None,
    *,
    tokens: str | Path | None = None,
    gpus: int = 1,
    workers: int | None = None,
    revision: str | None = None,
    adapter: str | None = None,
    fill_depformer_steps: bool = False,
    quiet: bool = True,
) -> DryRun:
    """Plan a conversion and forecast it; the Hub is asked for sizes, and nothing is downloaded or written.

    Arguments are those of ``convert``, and of its quantizer: calibration tokens and a number of GPUs. Raises UserError
    for what the target cannot load, and for a Hub id that does not exist.
    """
    plan, download = preparation.plan_and_download(
        source, recipe, revision=revision, adapter=adapter, fill_depformer_steps=fill_depformer_steps, quiet=quiet
    )
    threads = workers or cores()
    return DryRun(
        plan,
        threads,
        output_of(str(source), output, recipe),
        download,
        conversion_seconds(plan, threads),
        forecast.forecast(plan, tokens, gpus=gpus),
    )
