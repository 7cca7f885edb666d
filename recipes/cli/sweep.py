"""ppx-sweep: recipes over sources, on this machine or on a Ray cluster."""

from enum import StrEnum
from functools import partial
from pathlib import Path
from typing import Annotated

import typer

from ...convert.errors import UserError
from ...verify.sweeping import summary
from ...verify.sweeping import sweep as sweeps
from ...verify.sweeping.settings import KEEP
from . import console, endings, options

EXAMPLES = """\b
Examples:
  ppx-sweep sweep.toml --dry-run
      print the cells, with the size of each bundle and the time it takes
  ppx-sweep sweep.toml --output results
      convert and verify every cell here, one after another
  ppx-sweep sweep.toml --output results --ray auto --keep best
      use the Ray cluster that RAY_ADDRESS names, or all cores
  ppx-sweep sweep.toml --output results --ray 10.0.0.5:6379 \\
      --storage s3://bucket/sweep
      use machines that share no disk; files travel by the URL
"""

app = console.application()
KeptBundles = StrEnum("KeptBundles", {name: name for name in KEEP})  # type: ignore[misc]


@app.command(epilog=EXAMPLES)
@partial(endings.reported, interrupted="interrupted: run the same command again, cells that are done stay")
def sweep(
    file: Annotated[Path, typer.Argument(metavar="SWEEP", help="Read sources, recipes, methods, calibration.")],
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="Write results there; all machines must see it.")
    ] = None,
    ray: Annotated[
        str | None,
        typer.Option(metavar="ADDRESS", help="Run on a Ray cluster; auto: RAY_ADDRESS, else a local one."),
    ] = None,
    storage: Annotated[
        str | None, typer.Option(metavar="URL", help="Share files there: s3://, hf://, file:// of fsspec.")
    ] = None,
    keep: Annotated[
        KeptBundles | None,
        typer.Option(help="Keep bundles; best: on the Pareto front of their source.  [default: none]"),
    ] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print the cells, write and download nothing.")] = False,
    as_json: options.Json = False,
    _debug: options.Debug = False,
    _version: options.Version = False,
) -> None:
    """Convert and verify a matrix of sources, recipes, methods and calibration sets; read the results together.

    Cells that are done stay, so a killed sweep resumes, and a changed file runs only what changed. Ends with 1 if a
    cell failed; a bundle that is not intact is a result.
    """
    if dry_run:
        settings, made = sweeps.dry_run(file)
        if as_json:
            console.show_json(summary.plan_json(made))
        else:
            console.show(summary.plan_text(settings, made, on_ray=ray is not None))
        return
    if output is None:
        raise UserError("no folder for the results is given: use --output, or --dry-run")
    done = sweeps.sweep(file, output, ray=ray, storage=storage, keep=str(keep or KEEP[0]), quiet=as_json)
    console.show_json(summary.result_json(done)) if as_json else console.show(summary.result_text(done))
    sweeps.fail_if_failed(done)


def main() -> None:
    """Run the program."""
    app(prog_name="ppx-sweep")


if __name__ == "__main__":
    main()
