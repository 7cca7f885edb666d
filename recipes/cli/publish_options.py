"""Options of the programs that publish, and what they need."""

from typing import Annotated

import typer

from ...verify.publishing import gate
from . import console

PublishTo = Annotated[
    str | None,
    typer.Option("--publish", metavar="USER/NAME", help="Upload it if it is intact; see ppx-publish."),
]
Private = Annotated[bool, typer.Option("--private", help="Publish where only you see it.")]
BaseModel = Annotated[
    str | None,
    typer.Option(metavar="USER/NAME", help="Give the model card this base model, for a local source."),
]


def check(
    publish_to: str | None, verify: bool, private: bool, base_model: str | None, source: str, adapter: str | None
) -> None:
    """Raise UserError for options of ppx-convert that publish and do not fit each other."""
    console.needs("--publish", publish_to, "--verify", verify)
    console.needs("--private", private, "--publish", publish_to)
    console.needs("--base-model", base_model, "--publish", publish_to)
    gate.check_names(publish_to, base_model, source, adapter)
