"""What ppx-verify compares with, and what it reads."""

from pathlib import Path
from typing import Annotated

import typer

from ...model.mlx_device import ARITHMETICS
from . import options

Reference = Annotated[
    str | None,
    typer.Option(metavar="SOURCE", help="Compare with this checkpoint.  [default: the one it was made from, if found]"),
]
Adapter = Annotated[
    str | None,
    typer.Option(help="Merge this LoRA into it.  [default: the one that the manifest names, if on the Hub]"),
]
Tokens = Annotated[Path | None, typer.Option(help="Read evaluation tokens [N, streams, T], in safetensors.")]
Audio = Annotated[Path | None, typer.Option(help="Read a recording, a question after the system prompt.")]
Sequences = Annotated[int | None, typer.Option(min=1, help="Take at most so many sequences, or voices.")]
Frames = Annotated[int | None, typer.Option(min=2, help="Take at most so many frames of each (80 ms).")]
Rollout = Annotated[int, typer.Option(min=0, max=10000, help="Generate so many frames, greedily, on both.")]
Arithmetic = Annotated[
    options.ArithmeticName | None,
    typer.Option(help=f"Choose the dtype of the bundle's activations.  [default: {ARITHMETICS[0]}]"),
]
RoundTrip = Annotated[
    Path | None, typer.Option(metavar="QUESTION", help="Answer this recording, transcribe and judge the answer.")
]
Codec = Annotated[Path | None, typer.Option(help="Read Mimi's weights from a file.  [default: the bundle's]")]
