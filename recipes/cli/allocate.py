"""ppx-allocate: the recipe that loses least within a size, by what each part of the model suffers from fewer bits."""

from functools import partial
from pathlib import Path
from typing import Annotated

import typer

from ...calibrate import size_budget
from ...calibrate.allocation import AllocationRequest
from ...convert.bundle.targets import TARGETS
from ...convert.errors import UserError
from ...convert.source import source
from ...convert.source.tensors import COMPONENTS
from ...quant.affine import DEFAULT_METHOD
from . import console
from .choices import DtypeName, MethodName, TargetName

EXAMPLES = """\b
Examples:
  ppx-allocate nvidia/personaplex-7b-v1 --target-size 5.3GB -o mine.toml
      measure every part, choose, and write a recipe for the target mlx
  ppx-allocate ./my-finetune --bits-per-weight 4.6 --tokens mine.safetensors --depformer-steps 8 -o mine.toml
      by recorded conversations, without what predicts the user
  ppx-allocate ./my-finetune --target-size 4GB --sensitivity mine.sensitivity.json -o small.toml
      the same measurements for another size: no time
  ppx-convert ./my-finetune --recipe mine.toml
      what it is for
"""
DEFAULT_TARGET = "mlx"

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False, rich_markup_mode=None)


@app.command(epilog=EXAMPLES)
@partial(console.reported, interrupted="interrupted: nothing was written")
def allocate(
    where: Annotated[str, typer.Argument(metavar="SOURCE", help="The checkpoint: a Hub id, a folder, or demo.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="The recipe to write, NAME.toml.")],
    target_size: Annotated[
        str | None, typer.Option(metavar="SIZE", help="Of all files but manifest and report: 5.3GB, 800MB.")
    ] = None,
    bits_per_weight: Annotated[float | None, typer.Option(min=1, max=32, help="Of the model, scales included.")] = None,
    target: Annotated[TargetName | None, typer.Option(help=f"What will load it.  [default: {DEFAULT_TARGET}]")] = None,
    dtype: Annotated[
        DtypeName | None, typer.Option(help="Of floats, scales and biases.  [default: the target's]")
    ] = None,
    method: Annotated[
        MethodName | None, typer.Option(help=f"Quantizer that it is for.  [default: {DEFAULT_METHOD}]")
    ] = None,
    depformer_steps: Annotated[
        int | None, typer.Option(min=1, help="Keep only so many: 8 are the agent's, the user's are given.")
    ] = None,
    keep: Annotated[
        list[str] | None, typer.Option(metavar="COMPONENT", help=f"Stays float: {', '.join(COMPONENTS)}.")
    ] = None,
    tokens: Annotated[
        Path | None, typer.Option(help="Tokens [N, streams, T] to measure on.  [default: the model speaks some itself]")
    ] = None,
    sensitivity: Annotated[
        Path | None, typer.Option(help="Where measurements are kept.  [default: NAME.sensitivity.json]")
    ] = None,
    plot: Annotated[Path | None, typer.Option(help="Also draw measurements and choice, as SVG.")] = None,
    force: Annotated[bool, typer.Option("--force", help="Replace the recipe if it is there.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON; errors go to standard error.")] = False,
    _version: Annotated[
        bool, typer.Option("--version", callback=console.show_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    """Write the recipe that fits into a size and is expected to lose least.

    Every part of the model (an attention or MLP of the temporal transformer, a depformer step's, an embedding, a head)
    is quantized alone, at 2 to 8 bit, and the divergence of the predictions measured; that serves other sizes, too.
    """
    budget = size_budget.budget_of(target_size, bits_per_weight)
    if budget is None:
        raise UserError("no size is given: use --target-size or --bits-per-weight")
    console.check_new(output, ".toml", force)
    if unknown := [name for name in keep or [] if name not in COMPONENTS]:
        raise UserError(f"--keep {unknown[0]}: use {', '.join(COMPONENTS)}")
    quiet = console.quiet(as_json)
    consumer = TARGETS[str(target or DEFAULT_TARGET)]
    named = (str(dtype or consumer.dtype), str(method or DEFAULT_METHOD))
    wanted = AllocationRequest(budget, consumer.name, *named, depformer_steps, tuple(keep or ()))
    file = sensitivity or output.with_suffix(".sensitivity.json")
    for path in (None if file.exists() else file, plot):
        if path:
            console.check_folder(path)
    with source.open_source(source.locate(where, quiet=quiet)) as opened:
        fingerprints = source.fingerprint(opened, quiet)
        heard = size_budget.conversations(opened, fingerprints, tokens, output.with_suffix(""), quiet)
        found = size_budget.allocation(opened, fingerprints, wanted, heard, file, output, quiet)
    if plot:
        size_budget.draw(found, file, plot)
    console.show(size_budget.as_json(found) if as_json else size_budget.text(found))


def main() -> None:
    """Run the program."""
    app(prog_name="ppx-allocate")


if __name__ == "__main__":
    main()
