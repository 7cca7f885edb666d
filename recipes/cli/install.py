"""ppx-install: a bundle, to where the program that loads it looks."""

from functools import partial
from typing import Annotated

import typer

from ...convert import typed_json
from ...convert.bundle import install
from ...convert.bundle.describe import counted, size
from ...convert.errors import UserError
from . import bundle_argument, console, endings, options

EXAMPLES = """\b
Examples:
  ppx-install my-bundle --as me/personaplex-4bit
      link a bundle into the cache of speech-swift, and show how to load it
  ppx-install my-bundle --as me/personaplex-4bit --dry-run
      show what would be placed and replaced
  ppx-install my-bundle --as me/personaplex-4bit --remove
      undo it
  ppx-install me/personaplex-q4
      take a bundle on the Hub; for moshi-mlx it shows the command lines
"""

app = console.application()


@app.command(epilog=EXAMPLES)
@partial(endings.reported, interrupted="interrupted: nothing was installed; run the same command again")
def install_bundle(
    bundle: bundle_argument.Bundle,
    identity: Annotated[
        str | None,
        typer.Option(
            "--as", metavar="USER/NAME", help="Give it this name there.  [default: its Hub id, or local/FOLDER]"
        ),
    ] = None,
    revision: bundle_argument.Revision = None,
    copy: Annotated[
        bool, typer.Option("--copy", help="Copy the files, which takes disk space, not link them.")
    ] = False,
    remove: Annotated[
        bool, typer.Option("--remove", help="Remove what was installed; the bundle may be gone.")
    ] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Show what would be done, and change nothing.")] = False,
    as_json: options.Json = False,
    _debug: options.Debug = False,
    _version: options.Version = False,
) -> None:
    """Put a bundle where its program looks for it, and show how the program is run with it.

    For speech-swift the files are linked into its cache, voices included. What was not installed is never replaced.
    The programs for moshi-mlx and mlx take a bundle's own files: their command lines are shown.
    """
    quiet = console.quiet(as_json)
    if remove:
        if copy or revision:
            raise UserError("--remove takes away what is installed: leave --copy and --revision out")
        _show_removal(install.uninstall(bundle, identity, dry_run=dry_run, quiet=quiet), dry_run, as_json)
        return
    done = install.install(bundle, identity, revision=revision, copy=copy, dry_run=dry_run, quiet=quiet)
    if as_json:
        about = {"bundle": str(done.bundle), "folder": done.folder and str(done.folder), "dry_run": dry_run}
        others = {key: getattr(done, key) for key in ("target", "identity", "copied", "files", "replaces", "unchanged")}
        console.show_json(others | about | {"bytes": done.nbytes, "usage": typed_json.to_json(done.usage)})
        return
    if done.folder is None:
        console.show(f"{bundle}: nothing to install: programs for {done.target} take its files from where they are")
    else:
        verb = "is installed already" if done.unchanged else "would be installed" if dry_run else "is installed"
        how = "copies" if done.copied else "hard links, which take no disk space"
        console.show(f"{bundle} {verb} as {done.identity} for {done.target}")
        console.show(f"{done.folder}: {len(done.files)} files, {size(done.nbytes)} ({how})")
    if done.replaces:
        console.show(f"{'would replace' if dry_run else 'replaced'}: {done.replaces}")
    for usage in done.usage:
        console.show(f"{usage.program}: {' # '.join(part for part in (usage.line, usage.note) if part)}")


def _show_removal(done: install.Removal, dry_run: bool, as_json: bool) -> None:
    """Print what was removed."""
    if as_json:
        console.show_json(typed_json.to_json(done) | {"folder": str(done.folder), "dry_run": dry_run})
        return
    verb = "would be removed" if dry_run else "removed"
    console.show(f"{done.folder}: {counted(len(done.removed), 'file')} {verb} ({done.description})")
    for name in done.left:
        console.show(f"{name}: was not installed, or changed since: it stays")


def main() -> None:
    """Run the program."""
    app(prog_name="ppx-install")


if __name__ == "__main__":
    main()
