"""ppx-publish: a bundle that has passed, up to the Hugging Face Hub."""

import json
from functools import partial
from pathlib import Path
from typing import Annotated

import typer

from ...convert.bundle.describe import size
from ...verify.publish.gate import PublishOptions, UploadPlan, publish, ready
from . import console

EXAMPLES = """\b
Examples:
  ppx-publish my-bundle me/personaplex-4bit --dry-run
      show what would go up, without network
  ppx-publish my-bundle me/personaplex-4bit --private
      upload it where only you see it
  ppx-publish my-bundle someone/personaplex-4bit --create-pr
      propose it to somebody else
"""

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False, rich_markup_mode=None)


@app.command(epilog=EXAMPLES)
@partial(console.reported, interrupted="interrupted: the same command goes on; what is there is not sent again")
def publish_bundle(
    bundle: Annotated[Path, typer.Argument(metavar="BUNDLE", help="Folder that ppx-convert wrote.")],
    repository: Annotated[str, typer.Argument(metavar="USER/NAME", help="Where to; made if it is not there.")],
    private: Annotated[bool, typer.Option("--private", help="Make a repository that only you see.")] = False,
    create_pr: Annotated[bool, typer.Option("--create-pr", help="Open a pull request; the repository stays.")] = False,
    revision: Annotated[
        str | None, typer.Option(metavar="BRANCH", help="A branch, made if it is not there.  [default: main]")
    ] = None,
    force: Annotated[
        bool, typer.Option("--force", help="Publish without a passing report; the card then says so.")
    ] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Show what would go up; needs no network.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON; errors go to standard error.")] = False,
    _version: Annotated[
        bool, typer.Option("--version", callback=console.show_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    """Upload a bundle with its report and model card, and compare what arrived.

    Only a bundle whose report passes and is about these very files goes up, and nothing but the files that manifest,
    report and card name. Ends with the page's address; a second run with nothing new changes nothing.
    """
    quiet = console.quiet(as_json)
    wish = PublishOptions(private, create_pr, revision, force)
    if dry_run:
        _show(ready(bundle, repository, force, quiet), wish, as_json)
        return
    done = publish(bundle, repository, wish, quiet)
    said = {"page": done.page, "changed": done.changed, "others": done.others}
    console.show(json.dumps(said, indent=1) if as_json else done.line)


def _show(found: UploadPlan, wish: PublishOptions, as_json: bool) -> None:
    """Print what a dry run finds."""
    seen = "private" if wish.private else "public, or as the repository is"
    where = "a pull request" if wish.create_pr else wish.revision or "main"
    if as_json:
        files = {file.name: {"size": file.size, "sha256": file.sha256} for file in found.files}
        said = {"repository": found.repository, "where": where, "visibility": seen, "bytes": found.nbytes}
        console.show(json.dumps(said | {"objections": found.objections, "files": files}, indent=1))
        return
    for file in found.files:
        console.show(f"{size(file.size):>9}  {file.name}")
    for objection in found.objections:
        console.show(f"the card will say: {objection}")
    console.show(f"{len(found.files)} files, {size(found.nbytes)}, to {found.repository} ({where}; {seen})")


def main() -> None:
    """Run the program."""
    app(prog_name="ppx-publish")


if __name__ == "__main__":
    main()
