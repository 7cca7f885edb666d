"""ppx-publish: a bundle that is intact, up to the Hugging Face Hub."""

from functools import partial
from typing import Annotated

import typer

from ...convert.bundle.describe import size
from ...convert.file_names import CARD
from ...verify.publishing.gate import PublishOptions, UploadPlan, publish, ready
from . import console, endings, options, publish_options

EXAMPLES = """\b
Examples:
  ppx-publish my-bundle me/personaplex-4bit --dry-run
      show what would go up, without network
  ppx-publish my-bundle me/tune-4bit --base-model me/tune \\
      --dry-run --show-card
      print the model card that would go up, with the fine-tune as base model
  ppx-publish my-bundle me/personaplex-4bit --private
      upload it where only you see it
  ppx-publish my-bundle someone/personaplex-4bit --create-pr
      propose it to somebody else
"""

app = console.application()


@app.command(epilog=EXAMPLES)
@partial(endings.reported, interrupted="interrupted: run the same command again to resume: uploaded files are skipped")
def publish_bundle(
    bundle: options.Bundle,
    repository: Annotated[str, typer.Argument(metavar="USER/NAME", help="Upload there; made if it is not there.")],
    private: Annotated[bool, typer.Option("--private", help="Make a repository that only you see.")] = False,
    create_pr: Annotated[bool, typer.Option("--create-pr", help="Open a pull request; the repository stays.")] = False,
    revision: Annotated[
        str | None, typer.Option(metavar="BRANCH", help="Upload to a branch, made if it is not there.  [default: main]")
    ] = None,
    force: Annotated[
        bool, typer.Option("--force", help="Publish without a report that it is intact; the card then says so.")
    ] = False,
    base_model: publish_options.BaseModel = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Show what would go up; needs no network.")] = False,
    show_card: Annotated[bool, typer.Option("--show-card", help="Print the model card only, with --dry-run.")] = False,
    as_json: options.Json = False,
    _debug: options.Debug = False,
    _version: options.Version = False,
) -> None:
    """Upload a bundle with its report and model card, and compare what arrived.

    Only a bundle whose report says that these very files are intact goes up, and nothing but the files that manifest,
    report and card name. Ends with the page's address; a second run with nothing new changes nothing.
    """
    quiet = console.quiet(as_json)
    console.needs("--show-card", show_card, "--dry-run", dry_run)
    how = PublishOptions(private, create_pr, revision, force, base_model)
    if dry_run:
        plan = ready(bundle, repository, force, quiet, base_model)
        console.show(plan.card[CARD].removesuffix("\n")) if show_card and not as_json else _show(plan, how, as_json)
        return
    done = publish(bundle, repository, how, quiet=quiet)
    if as_json:
        console.show_json({"page": done.page, "changed": done.changed, "others": done.others})
    else:
        console.show(done.line)


def _show(plan: UploadPlan, how: PublishOptions, as_json: bool) -> None:
    """Print what a dry run finds."""
    visibility = "private" if how.private else "public, or as the repository is"
    where = "a pull request" if how.create_pr else how.revision or "main"
    if as_json:
        files = {file.name: {"size": file.size, "sha256": file.sha256} for file in plan.files}
        summary = {"repository": plan.repository, "where": where, "visibility": visibility, "bytes": plan.nbytes}
        summary |= {"base_model": plan.base_models, "card": plan.card[CARD]}
        console.show_json(summary | {"objections": plan.objections, "files": files})
        return
    for file in plan.files:
        console.show(f"{size(file.size):>9}  {file.name}")
    if not plan.base_models:
        console.say("the card names no base model: --base-model gives it the repository of a local source")
    for objection in plan.objections:
        console.show(f"the card will say: {objection}")
    console.show(f"{len(plan.files)} files, {size(plan.nbytes)}, to {plan.repository} ({where}; {visibility})")


def main() -> None:
    """Run the program."""
    app(prog_name="ppx-publish")


if __name__ == "__main__":
    main()
