"""ppx-inspect: what is in a source or bundle."""

from typing import Annotated

import typer

from ...convert.bundle import inspect, integrity
from ...convert.errors import CheckFailed
from . import bundle_argument, console, endings, options

EXAMPLES = """\b
Examples:
  ppx-inspect my-bundle
      show components, bytes, bits per weight, voices
  ppx-inspect my-bundle --check
      hash every file and compare with the manifest
  ppx-inspect demo --tensors --json
      list every tensor of a source, for a program
  ppx-inspect me/personaplex-4bit --check
      take a bundle on the Hub, downloaded first
"""

app = console.application()


@app.command(epilog=EXAMPLES)
@endings.reported
def inspect_folder(
    path: Annotated[
        str, typer.Argument(metavar="PATH", help="Take the folder or Hub id of a source or bundle, or demo.")
    ],
    revision: bundle_argument.Revision = None,
    tensors: Annotated[bool, typer.Option("--tensors", help="List every tensor.")] = False,
    check: Annotated[bool, typer.Option("--check", help="Hash a bundle's files, compare with its manifest.")] = False,
    as_json: options.Json = False,
    _debug: options.Debug = False,
    _version: options.Version = False,
) -> None:
    """Show what is in a source or bundle: components, parameters, bytes, dtypes, bits per weight, voices."""
    quiet = console.quiet(as_json)
    folder = inspect.folder_of(path, revision, quiet)
    differences = [str(problem) for problem in integrity.check(folder, quiet)] if check else []
    if differences:
        if as_json:
            console.show_json({"path": str(folder), "differences": differences})
        raise CheckFailed("; ".join(differences))
    contents = inspect.read_contents(folder)
    if as_json:
        console.show_json(contents.to_json(tensors) | ({"differences": []} if check else {}))
    else:
        console.show(inspect.text(contents, tensors))
        if check:
            typer.echo("every file is the one that the manifest names")


def main() -> None:
    """Run the program."""
    app(prog_name="ppx-inspect")


if __name__ == "__main__":
    main()
