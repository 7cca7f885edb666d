"""Mistakes in a command line, in one line and in this toolkit's words: what was given, and what can be."""

import inspect
import re
from collections.abc import Sequence
from difflib import get_close_matches
from enum import Enum
from typing import Any, get_args, get_origin, get_type_hints

import typer
from typer.core import TyperCommand

from ...convert.errors import printable
from .hints import OF_MLX_LM

MISTAKE = 2  # exit status
UsageError: Any = typer.BadParameter.__base__  # of click, or of the copy of it that typer has


class Command(TyperCommand):
    """A program whose mistakes in options are told as all others are."""

    def make_context(self, info_name: str | None, args: list[str], parent: Any = None, **extra: Any) -> Any:
        """Read the command line; ends the program with one line for what cannot be read."""
        given = list(args)  # which click empties
        try:
            return super().make_context(info_name, args, parent, **extra)
        except UsageError as error:
            module = inspect.unwrap(self.callback).__module__ if self.callback else ""
            own = info_name is not None and info_name.startswith("ppx-")
            name = str(info_name) if own else f"ppx-{module.rpartition('.')[2]}"
            typer.echo(printable(f"error: {_message(self, error, given, name)}"), err=True)
            raise typer.Exit(MISTAKE) from None


def _message(command: TyperCommand, error: Any, given: Sequence[str], program: str) -> str:
    """Return the line for a mistake that click has found."""
    kind, help_of = type(error).__name__, f"{program} -h lists what there is"
    if kind == "NoSuchOption":
        option = str(error.option_name)
        if program == "ppx-convert" and (instead := OF_MLX_LM.get(option)):
            return f"{option}: no such option here: {instead}"
        known = [opt for parameter in command.params for opt in (*parameter.opts, *parameter.secondary_opts)]
        near = get_close_matches(option, known, 1, 0.7)
        return f"{option}: no such option: {f'did you mean {near[0]}? ' if near else ''}{help_of}"
    if kind == "BadOptionUsage":
        return f"{error.option_name} needs a value: {help_of}"
    parameter = getattr(error, "param", None)
    if kind == "MissingParameter" and parameter is not None:
        return f"{_name(parameter)} is not given: {help_of}"
    if kind == "BadParameter" and parameter is not None:
        value = _value(parameter.opts, given)
        return f"{_name(parameter)}{f' is {value!r}' if value else ''}: {_needed(command, parameter, value)}"
    if extra := re.search(r"unexpected extra arguments?(?:\(s\))? \((.*)\)", str(error.message)):
        return f"{extra[1]}: one argument too many: {help_of}"
    return f"{error.format_message().rstrip('.')}: {help_of}"


def _name(parameter: Any) -> str:
    """Return what help calls a parameter."""
    if parameter.param_type_name == "option":
        return str(max(parameter.opts, key=len) if len(parameter.opts) < 2 else _first_long(parameter.opts))
    return str(parameter.metavar or parameter.name.upper()).strip("[]")


def _first_long(options: Sequence[str]) -> str:
    return next((option for option in options if option.startswith("--")), options[0])


def _value(options: Sequence[str], given: Sequence[str]) -> str:
    """Return the value that was given for an option, the last one, empty if it is not seen."""
    value = ""
    for place, argument in enumerate(given):
        name, equals, rest = argument.partition("=")
        if name in options:
            value = rest if equals else next(iter(given[place + 1 :]), "")
    return value


def _needed(command: TyperCommand, parameter: Any, value: str) -> str:
    """Return what a parameter can be, from the annotation of the program's function."""
    callback: Any = inspect.unwrap(command.callback) if command.callback else None
    hint = get_type_hints(callback, include_extras=True).get(parameter.name) if callback else None
    info = next((extra for extra in get_args(hint)[1:] if hasattr(extra, "param_decls")), None)
    types = _types(hint)
    for one in types:
        if isinstance(one, type) and issubclass(one, Enum):
            listed = str(getattr(info, "metavar", None) or "").strip("[]")
            names = listed.split("|") if "|" in listed else [str(member.value) for member in one]
            near = get_close_matches(value, names, 1)
            return f"use {', '.join(names)}{f': did you mean {near[0]}?' if near else ''}"
    number = "a whole number" if int in types else "a number" if float in types else ""
    if number:
        low, high = (getattr(info, bound, None) for bound in ("min", "max"))
        within = f" of at least {low}" if high is None else f" from {low} to {high}"
        return f"{number}{within if low is not None else ''} is needed"
    return "not a value that it can have"


def _types(hint: Any) -> list[Any]:
    """Return the plain types in an annotation."""
    if get_origin(hint) is None:
        return [hint]
    return [
        one for argument in get_args(hint)[: 1 if hasattr(hint, "__metadata__") else None] for one in _types(argument)
    ]
