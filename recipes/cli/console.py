"""What the command-line programs share: help, checks of options, and what they print."""

import json
import sys
from collections.abc import Callable, Mapping
from importlib.metadata import version
from typing import Any, TypeVar

import typer
from typer.core import TyperCommand

from ...convert.bundle.manifest import TOOLKIT
from ...convert.bundle.recipe_choice import DEFAULT_GROUP_SIZE
from ...convert.errors import UserError, printable, refuse
from ...quant.affine import QuantizationConfig
from .usage import Command

Function = TypeVar("Function", bound=Callable[..., Any])


class Application(typer.Typer):
    """A program; mistakes in its command line are told in its words."""

    def command(
        self, name: str | None = None, *, cls: type[TyperCommand] | None = None, **more: Any
    ) -> Callable[[Function], Function]:
        """Add the program's command."""
        return super().command(name, cls=cls or Command, **more)


def application() -> Application:
    """Return a program without commands yet; its help is plain text, for ``-h`` too."""
    return Application(
        add_completion=False,
        pretty_exceptions_enable=False,
        rich_markup_mode=None,
        context_settings={"help_option_names": ["-h", "--help"]},
    )


def one_of(options: Mapping[str, object]) -> None:
    """Raise UserError if more than one of some options is given."""
    given = [option for option, value in options.items() if value is not None and value is not False]
    if len(given) > 1:
        raise UserError(f"{' and '.join(given)} contradict each other: give one of them")


def check_quantization(bits: int | None, group_size: int | None) -> None:
    """Raise UserError for bits and a group size that no format has, by the names of their options."""
    needs("--group-size", group_size, "--bits", bits)
    if bits is None:
        return
    problems = QuantizationConfig(bits, group_size or DEFAULT_GROUP_SIZE).problems()
    refuse([f"--{name.replace('_', '-')} {problem}" for name, problem in problems.items()])


def needs(option: str, value: object, other: str, given: object) -> None:
    """Raise UserError for an option that has no effect without another one."""
    if value and (given is None or given is False):
        raise UserError(f"{option} needs {other}: give both")


def only_with_gptq(by_data: bool, **options: object) -> None:
    """Raise UserError for options that have no effect where nothing is quantized ``by_data``."""
    given = " and ".join(f"--{name}" for name, value in options.items() if value)
    if given and not by_data:
        raise UserError(f"only the method gptq takes {given}: leave {given} out, or choose --method gptq")


def show_json(value: Mapping[str, Any]) -> None:
    """Print JSON for a program to read."""
    show(json.dumps(value, indent=1))


def show(text: str) -> None:
    """Print lines for people: names from files of others cannot command the terminal."""
    typer.echo("\n".join(map(printable, text.split("\n"))))


def advise(option: str, advice: str | None) -> None:
    """Print advice that begins with what an option can be, if there is any."""
    if advice:
        show(f"{option} {advice}")


def say(line: str) -> None:
    """Write a line for people, beside the output."""
    typer.echo(printable(line), err=True)


def quiet(as_json: bool) -> bool:
    """Tell whether progress would only disturb: output for a program, or there is no standard error."""
    return as_json or sys.stderr is None


def show_version(asked: bool) -> None:
    """Print the version and end, where it is asked for."""
    if asked:
        typer.echo(f"{TOOLKIT} {version(TOOLKIT)}")
        raise typer.Exit
