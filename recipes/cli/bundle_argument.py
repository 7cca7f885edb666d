"""The bundle that a program reads: a folder, or what it downloads from the Hub."""

from typing import Annotated

import typer

Bundle = Annotated[
    str, typer.Argument(metavar="BUNDLE", help="Folder that ppx-convert wrote, or Hub id of one that was published.")
]
Revision = Annotated[str | None, typer.Option(help="Branch, tag or commit of a bundle on the Hub.  [default: main]")]
