"""ppx-bench: is this machine fast enough for a conversation?"""

from functools import partial
from typing import Annotated

import typer

from ...convert.bundle.location import locate_bundle
from ...speak import benchmark
from . import bundle_argument, console, endings, options

EXAMPLES = """\b
Examples:
  ppx-bench my-bundle
      time the parts of a frame, and say whether this machine keeps up
  ppx-bench my-bundle --context-frames 3000
      time the same, four minutes into a conversation
  ppx-bench me/personaplex-4bit
      time a bundle on the Hub, downloaded first
"""

app = console.application()


@app.command(epilog=EXAMPLES)
@partial(endings.reported, interrupted="interrupted")
def bench(
    bundle: bundle_argument.Bundle,
    frames: Annotated[int, typer.Option(min=2, max=100_000, help="Time so many frames.")] = benchmark.DEFAULT_FRAMES,
    context_frames: Annotated[
        int,
        typer.Option(
            "--context-frames",
            "--remembered",
            min=0,
            max=100_000,
            show_default="a voice and a prompt",
            help="Put so many frames into the KV cache before the first.",
        ),
    ] = 0,
    revision: bundle_argument.Revision = None,
    codec: options.Codec = None,
    arithmetic: options.Arithmetic = None,
    device: options.Device = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the figures as JSON, in seconds and bytes.")] = False,
    _debug: options.Debug = False,
    _version: options.Version = False,
) -> None:
    """Time a conversation with a bundle, frame by frame: a frame lasts 80 ms, and must take less than that.

    The bound is the time in which this machine's memory can read the weights that a frame needs.
    """
    quiet = console.quiet(as_json)
    figures = benchmark.measure(
        locate_bundle(bundle, revision, quiet),
        frames,
        context_frames=context_frames,
        arithmetic=arithmetic and str(arithmetic),
        codec=codec,
        device=device and str(device),
        quiet=quiet,
        silent=as_json,
    )
    console.show_json(figures.to_json()) if as_json else console.show(benchmark.text(figures))


def main() -> None:
    """Run the program."""
    app(prog_name="ppx-bench")


if __name__ == "__main__":
    main()
