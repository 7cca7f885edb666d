"""ppx-allocate: the recipe that is expected to diverge least within a size, by measured sensitivities."""

import shlex
from functools import partial
from pathlib import Path
from typing import Annotated

import typer

from ...calibrate import size_budget
from ...calibrate.allocation import DEFAULT_TARGET
from ...convert.errors import UserError
from . import console, endings, options

EXAMPLES = """\b
Examples:
  ppx-allocate nvidia/personaplex-7b-v1 --target-size 5.3GB -o mine.toml
      write the recipe of 5.3 GB for the target mlx
  ppx-allocate ./my-finetune --bits-per-weight 4.6 --depformer-steps 8 \\
      --tokens mine.safetensors -o mine.toml
      measure on recorded conversations, without what predicts the user
  ppx-allocate ./my-finetune --target-size 4GB \\
      --sensitivity mine.sensitivity.json -o small.toml
      use the same measurements for another size, in no time
  ppx-convert ./my-finetune --recipe mine.toml
      convert with what was written
"""

app = console.application()


@app.command(epilog=EXAMPLES)
@partial(endings.reported, interrupted="interrupted: nothing was written")
def allocate(
    where: options.Checkpoint,
    output: Annotated[Path, typer.Option("--output", "-o", help="Write the recipe NAME.toml.")],
    target_size: options.TargetSize = None,
    bits_per_weight: options.BitsPerWeight = None,
    target: Annotated[
        options.TargetName | None, typer.Option(help=f"Choose what will load it.  [default: {DEFAULT_TARGET}]")
    ] = None,
    dtype: options.Dtype = None,
    method: options.Method = None,
    depformer_steps: options.DepformerSteps = None,
    keep: options.Keep = None,
    tokens: options.CalibrationTokens = None,
    sensitivity: Annotated[
        Path | None,
        typer.Option(
            help="Use the measurements in a file; write it if it is not there.  [default: NAME.sensitivity.json]"
        ),
    ] = None,
    plot: Annotated[
        Path | None, typer.Option(help="Draw measurements, bits of each part, and other sizes, as SVG.")
    ] = None,
    revision: options.Revision = None,
    adapter: options.Adapter = None,
    fill_depformer_steps: options.FillDepformerSteps = False,
    force: Annotated[bool, typer.Option("--force", help="Replace the recipe if it is there.")] = False,
    as_json: options.Json = False,
    _debug: options.Debug = False,
    _version: options.Version = False,
) -> None:
    """Write the recipe that fits into a size and is expected to diverge least.

    Every part of the model (an attention or MLP of the temporal transformer, a depformer step's, an embedding, a head)
    is quantized alone, at 2 to 8 bit, and the divergence of the predictions measured; that serves other sizes, too.
    """
    console.one_of({"--target-size": target_size, "--bits-per-weight": bits_per_weight})
    if not target_size and not bits_per_weight:
        raise UserError("no size is given: use --target-size or --bits-per-weight")
    allocation = size_budget.allocate(
        where,
        output,
        target_size=target_size,
        bits_per_weight=bits_per_weight,
        target=target,
        dtype=dtype,
        method=method,
        depformer_steps=depformer_steps,
        keep=keep or (),
        tokens=tokens,
        sensitivity_file=sensitivity,
        plot=plot,
        revision=revision,
        adapter=adapter,
        fill_depformer_steps=fill_depformer_steps,
        force=force,
        quiet=console.quiet(as_json),
    )
    if as_json:
        console.show(size_budget.as_json(allocation))
        return
    line, measured_on = size_budget.text(allocation).split("\n")
    source = ["--revision", revision] if revision else []
    source += ["--adapter", adapter] if adapter else []
    source += ["--fill-depformer-steps"] if fill_depformer_steps else []
    console.show(line)
    console.show(f"wrote {output}; next: {shlex.join(['ppx-convert', where, '--recipe', str(output), *source])}")
    console.show(measured_on)


def main() -> None:
    """Run the program."""
    app(prog_name="ppx-allocate")


if __name__ == "__main__":
    main()
