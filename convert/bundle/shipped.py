"""The recipes that come with the toolkit, by name."""

from difflib import get_close_matches
from importlib.resources import files
from pathlib import Path

from ..errors import UserError
from . import recipe_file
from .recipe import Recipe

_FOLDER = f"{__package__.partition('.')[0]}.recipes"  # data only: the files stand where people look for them


def names() -> list[str]:
    """Return the names of the recipes that come with the toolkit."""
    return sorted(
        entry.name.removesuffix(".toml") for entry in files(_FOLDER).iterdir() if entry.name.endswith(".toml")
    )


def load(name_or_file: str, target: str | None = None) -> Recipe:
    """Load a shipped recipe by name, or one from a file, for another target than it names if one is given.

    Raises UserError that lists all of a recipe's mistakes, each with its line.
    """
    if name_or_file in names():
        text = (files(_FOLDER) / f"{name_or_file}.toml").read_text("utf-8")
        return recipe_file.parse(text, name_or_file, name_or_file, target)
    try:
        path = Path(name_or_file).expanduser()
        exists = path.exists()
    except (OSError, RuntimeError, ValueError):  # of an invalid name, and ~somebody
        raise UserError(f"{name_or_file}: not a text file that can be read: give a recipe in TOML") from None
    if not exists:
        near = get_close_matches(name_or_file, names(), 1)
        meant = f"did you mean {near[0]}? " if near else ""
        raise UserError(f"{name_or_file}: no such recipe or file: {meant}shipped are {', '.join(names())}")
    return recipe_file.read(path, target)
