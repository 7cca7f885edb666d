"""ppx-bench: is this machine fast enough for a conversation?"""

import json
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import typer

from ...convert.bundle.describe import size
from ...convert.progress import bar
from ...convert.source.mimi import FRAME, RATE
from . import console
from .choices import ArithmeticName, DeviceName

EXAMPLES = """\b
Examples:
  ppx-bench my-bundle
      how long a frame of 80 ms takes here, and how long it must take at least
  ppx-bench my-bundle --remembered 3000
      the same, four minutes into a conversation
"""

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False, rich_markup_mode=None)


@app.command(epilog=EXAMPLES)
@partial(console.reported, interrupted="interrupted")
def bench(
    bundle: Annotated[Path, typer.Argument(metavar="BUNDLE", help="Folder that ppx-convert wrote.")],
    frames: Annotated[int, typer.Option(min=2, max=100_000, help="Frames to time.")] = 125,
    remembered: Annotated[
        int, typer.Option(min=0, max=100_000, help="Frames that lie behind them.  [default: a voice and a prompt]")
    ] = 0,
    codec: Annotated[Path | None, typer.Option(help="File of Mimi's weights.  [default: the bundle's]")] = None,
    arithmetic: Annotated[
        ArithmeticName | None, typer.Option(help="Of activations.  [default: bundle on a GPU, else float32]")
    ] = None,
    device: Annotated[
        DeviceName | None, typer.Option(help="Where to compute.  [default: gpu if MLX has one, else cpu]")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the figures as JSON, in seconds and bytes.")] = False,
    _version: Annotated[
        bool, typer.Option("--version", callback=console.show_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    """Time a conversation with a bundle, frame by frame: a frame lasts 80 ms, and must take less than that.

    The bound is the time in which this machine's memory can bring the weights that a frame reads.
    """
    from ...model.mlx_device import computing_on
    from ...speak import benchmark  # imports mlx: a second that --help does not need

    with computing_on(device and str(device)), bar("speaking", frames, "frame", console.quiet(as_json)) as progress:
        found = benchmark.measure(bundle, frames, remembered, arithmetic and str(arithmetic), codec, progress, as_json)
    console.show(json.dumps(found, indent=1) if as_json else text(found))


def text(found: Mapping[str, Any]) -> str:
    """Return what is printed for people."""
    frame, parts, prefill = found["frame"], found["parts"], found["prefill"]
    factor, memory = found["real_time_factor"], found["peak_memory"]
    fast = "fast enough to talk to" if frame["p95"] + parts.get("codec", 0) < FRAME / RATE else "too slow to talk to"
    total = sum(parts.values())
    shares = ", ".join(f"{name} {_ms(seconds)} ({seconds / total:.0%})" for name, seconds in parts.items())
    lines = [
        f"{found['recipe']} for {found['target']}, activations in {found['arithmetic']}; {found['ran_on']}",
        f"a frame: median {_ms(frame['p50'])}, 95% {_ms(frame['p95'])}, 99% {_ms(frame['p99'])}; it lasts 80 ms",
        f"real time factor {factor:.2f}{'' if 'codec' in parts else ', without a codec (none here loads)'}: {fast}",
        f"one by one: {shares}",
        f"at least {_ms(found['bound'])}: {size(found['bytes_a_frame'])} a frame at {size(found['bandwidth'])}/s",
        f"voice and prompt: {prefill['seconds']:.2f} s for {prefill['frames']} frames; first frame "
        f"{found['first_frame']:.2f} s; loading {found['load']:.2f} s",
        *(f"MLX computes quantized_matmul wrongly here; worked around: {line}" for line in found["worked_around"]),
        f"peak memory: {size(memory['process'])} of the process, {size(memory['mlx'])} in MLX",
    ]
    return "\n".join(lines)


def _ms(seconds: float) -> str:
    return f"{1000 * seconds:.1f} ms"


def main() -> None:
    """Run the program."""
    app(prog_name="ppx-bench")


if __name__ == "__main__":
    main()
