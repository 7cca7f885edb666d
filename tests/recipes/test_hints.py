"""Advice after an error: neutral words in the library, the programs' options on the terminal."""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
import typer
from ppx.convert.errors import CheckFailed, Problem, UserError, refuse
from ppx.convert.hints import Hint
from ppx.recipes.cli import (
    allocate,
    bench,
    calibrate,
    convert,
    endings,
    inspect,
    install,
    publish,
    speak,
    sweep,
    verify,
    voice,
)
from ppx.recipes.cli.hints import HINTS

ROOT = Path(__file__).parent.parent.parent
LIBRARY = ("quant", "convert", "model", "speak", "calibrate", "verify")
COMMANDS = {  # functions that return a command which people run again
    "convert/bundle/consumers.py": "commands",
    "verify/publishing/card.py": "command",
    "verify/provenance.py": "command_of",
    "verify/sweeping/sweep.py": "_command",
}
FLAG = re.compile(r"(?<!var\()--[a-z][a-z-]*")  # CSS has variables of the same form
PROGRAMS = (allocate, bench, calibrate, convert, inspect, install, publish, speak, sweep, verify, voice)


def strings(tree: ast.AST, but: str = "") -> Iterator[ast.Constant]:
    """String literals, docstrings and parts of f-strings included, outside of one function."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            yield node
        if not (isinstance(node, ast.FunctionDef) and node.name == but):
            yield from strings(node, but)


def test_the_library_names_no_option_of_a_program():
    found = []
    for path in (path for folder in LIBRARY for path in (ROOT / folder).rglob("*.py")):
        name = str(path.relative_to(ROOT))
        literals = strings(ast.parse(path.read_text()), COMMANDS.get(name, ""))
        found += [f"{name}:{node.lineno}: {flag}" for node in literals for flag in FLAG.findall(str(node.value))]
    assert not found


def test_an_option_in_a_string_is_found():
    """What the test above goes by."""
    tree = ast.parse(
        'def f(x):\n    """Doc --one."""\n    return f"{x} --two var(--ink)"\ndef g():\n    return "--three"'
    )
    assert [flag for node in strings(tree, "g") for flag in FLAG.findall(str(node.value))] == ["--one", "--two"]


def test_every_hint_is_given_somewhere():
    texts = [path.read_text() for folder in LIBRARY for path in (ROOT / folder).rglob("*.py")]
    unused = [hint.name for hint in Hint if not any(f"Hint.{hint.name}" in text for text in texts)]
    assert not unused


def test_hints_name_options_that_programs_have():
    known: set[str] = set()
    for program in PROGRAMS:
        known.update(*(parameter.opts for parameter in typer.main.get_command(program.app).params))
    assert "--force" in known
    for hint, words in HINTS.items():
        options = FLAG.findall(words)
        assert set(options) <= known, hint
        assert options or "ppx-" in words, f"{hint} has the same words in a program: leave it out"


def test_a_problem_is_one_line():
    assert str(Problem("", "no such file")) == "no such file"
    assert str(Problem("a.json", "is empty", "download it again")) == "a.json: is empty: download it again"
    there = Problem("out", "is a file", Hint.OTHER_OUTPUT)
    assert str(there) == "out: is a file: choose another output"
    assert there.line(HINTS) == "out: is a file: choose another --output"
    assert str(there.within("folder")) == "folder: out: is a file: choose another output"
    assert str(Problem("", "x").within("folder")) == "folder: x"


def test_errors_take_messages_and_problems():
    error = UserError(["one", Problem("two", "is wrong")], Hint.CONVERT_AGAIN)
    assert error.problems == [Problem("", "one", Hint.CONVERT_AGAIN), Problem("two", "is wrong")]
    assert str(error) == f"one: {Hint.CONVERT_AGAIN.value}\ntwo: is wrong"
    assert CheckFailed("bad", "mend it").problem == Problem("", "bad", "mend it")
    refuse([])
    with pytest.raises(UserError, match="two: is wrong"):
        refuse(error.problems)


@pytest.mark.parametrize(
    ("error", "line", "status"),
    [
        (UserError("out: is there", Hint.OTHER_OUTPUT_OR_REPLACE), "error: out: is there: choose another --output,", 2),
        (CheckFailed("out: not published", Hint.PUBLISH_ANYWAY), "check failed: out: not published: --force", 1),
    ],
)
def test_the_terminal_shows_the_options(error, line, status, capsys):
    def command() -> None:
        raise error

    with pytest.raises(typer.Exit) as ended:
        endings.reported(command)()
    assert ended.value.exit_code == status
    assert line in capsys.readouterr().err
