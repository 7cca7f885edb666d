"""The bundle that a program reads: a folder, or what it downloads from the Hub."""

from typing import Annotated

import typer

Bundle = Annotated[
    str, typer.Argument(metavar="BUNDLE", help="Take a folder that ppx-convert wrote, or the Hub id of one.")
]
Revision = Annotated[
    str | None, typer.Option(help="Take a branch, tag or commit of a bundle on the Hub.  [default: main]")
]
