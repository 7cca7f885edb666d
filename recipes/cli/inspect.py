"""ppx-inspect: what a source or bundle holds."""

import json
from pathlib import Path
from typing import Annotated

import typer

from ...convert.bundle.describe import size
from ...convert.bundle.inspect import Contents, read_contents
from ...convert.bundle.integrity import differences
from ...convert.bundle.manifest import read_manifest
from ...convert.errors import CheckFailed, UserError
from ...convert.progress import byte_bar
from ...convert.source.source import is_hub_id, locate, locate_here
from . import console

EXAMPLES = """\b
Examples:
  ppx-inspect my-bundle
      components, bytes, bits a weight, voices
  ppx-inspect my-bundle --check
      hash every file and compare with the manifest
  ppx-inspect demo --tensors --json
      every tensor of a source, for a program
"""

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False, rich_markup_mode=None)


@app.command(epilog=EXAMPLES)
@console.reported
def inspect(
    path: Annotated[str, typer.Argument(metavar="PATH", help="Folder of a source or bundle, or demo.")],
    tensors: Annotated[bool, typer.Option("--tensors", help="List every tensor.")] = False,
    check: Annotated[bool, typer.Option("--check", help="Hash a bundle's files, compare with its manifest.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON; errors go to standard error.")] = False,
    _version: Annotated[
        bool, typer.Option("--version", callback=console.show_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    """Show what a source or bundle holds: components, parameters, bytes, dtypes, bits a weight, voices."""
    quiet = console.quiet(as_json)
    folder = _folder(path, quiet)
    found = _check(path, folder, quiet) if check else []
    if found:
        if as_json:
            console.show(json.dumps({"path": str(folder), "differences": found}, indent=1))
        raise CheckFailed("; ".join(found))
    contents = read_contents(folder)
    said = contents.to_json(tensors) | ({"differences": found} if check else {})
    console.show(json.dumps(said, indent=1) if as_json else _text(contents, tensors))
    if check and not as_json:
        typer.echo("every file is the one that the manifest names")


def _check(path: str, folder: Path, quiet: bool) -> list[str]:
    manifest = read_manifest(folder)
    if manifest is None:
        raise UserError(f"{path}: has no manifest to check against: leave --check out")
    with byte_bar("checking", manifest.nbytes, quiet) as bar:
        return differences(folder, manifest, bar)


def _folder(path: str, quiet: bool) -> Path:
    if Path(path).is_dir():
        return Path(path)
    location = locate_here(path, quiet=quiet) if is_hub_id(path) else locate(path, quiet=quiet)
    if location is None:
        raise UserError(f"{path}: not a folder, and not in the Hub's cache: run `hf download {path}` first")
    return location.folder


def _text(contents: Contents, every_tensor: bool) -> str:
    """Return what is printed for people."""
    total = sum(contents.files.values())
    lines = [f"{contents.folder}: a {contents.kind}, {len(contents.files)} files, {size(total)}"]
    if contents.missing:
        lines.append(f"missing: {', '.join(contents.missing)}")
    if contents.manifest:
        bundle = contents.manifest
        lines.append(f"made from {bundle.source.id} for {bundle.target}, recipe {bundle.recipe.name}, {bundle.dtype}")
    lines += ["", f"{'component':<12}{'tensors':>8}{'parameters':>16}{'bytes':>11}{'bits/weight':>13}  dtypes"]
    for row in contents.components():
        bits = "" if row["bits_per_weight"] is None else f"{row['bits_per_weight']:.2f}"
        lines.append(
            f"{row['component']:<12}{row['tensors']:>8}{row['parameters']:>16,}{size(row['bytes']):>11}{bits:>13}  "
            f"{', '.join(row['dtypes'])}"
        )
    lines += ["", f"{len(contents.voices)} voices: {', '.join(contents.voices)}"]
    if every_tensor:
        lines.append("")
        lines += [
            f"{held.file}  {held.name}  {held.dtype} {list(held.shape)}  {size(held.nbytes)}"
            for held in contents.tensors
        ]
    return "\n".join(lines)


def main() -> None:
    """Run the program."""
    app(prog_name="ppx-inspect")


if __name__ == "__main__":
    main()
