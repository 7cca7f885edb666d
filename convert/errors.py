"""Mistakes of the user's, or of a source: reported in full, without a traceback."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Self

from .hints import Hint


@dataclass(frozen=True)
class Problem:
    """One thing that the user can correct.

    place: the file, tensor or setting, where the message does not name it. message: what was found, and what is needed.
    hint: what to do next, where the message does not end with it.
    """

    place: str
    message: str
    hint: str | Hint = ""

    def line(self, hints: Mapping[Hint, str]) -> str:
        """Return it as one line. hints: other words for some hints, such as a program's options."""
        hint = hints.get(self.hint, self.hint.value) if isinstance(self.hint, Hint) else self.hint
        return ": ".join(part for part in (self.place, self.message, hint) if part)

    def __str__(self) -> str:
        return self.line({})

    def within(self, place: str) -> Self:
        """Return the problem of something that lies in another place: a tensor in a file."""
        return replace(self, place=f"{place}: {self.place}" if self.place else place)


class UserError(Exception):
    """Something that the user can correct: one or more problems, each with what was found and what to do next."""

    def __init__(self, problems: str | Problem | Iterable[str | Problem], hint: str | Hint = "") -> None:
        """Take problems, or messages; hint: what to do next about messages."""
        given = [problems] if isinstance(problems, str | Problem) else problems
        self.problems = [one if isinstance(one, Problem) else Problem("", one, hint) for one in given]
        super().__init__("\n".join(map(str, self.problems)))


class CheckFailed(Exception):  # noqa: N818  (it names what happened to the user's bundle)
    """A check of something that was written or published did not pass."""

    def __init__(self, problem: str | Problem, hint: str | Hint = "") -> None:
        """Take what did not pass, or a message and what to do next."""
        self.problem = problem if isinstance(problem, Problem) else Problem("", problem, hint)
        super().__init__(str(self.problem))


def refuse(problems: Sequence[str | Problem]) -> None:
    """Raise UserError with all problems, if there are any."""
    if problems:
        raise UserError(problems)


def printable(text: str) -> str:
    """Return a text in which nothing can command a terminal, or fail to be written as UTF-8."""
    return "".join(character if character.isprintable() else "\ufffd" for character in text)


def check_name(name: str, what: str) -> str:
    """Return a name that goes into a manifest; raises UserError for one that cannot be printed, or is not UTF-8."""
    if not name.isprintable():
        raise UserError(f"{what} {name!a}: its name has characters that cannot be printed: rename it")
    return name


def reason(error: Exception) -> str:
    """Return the first line of a library's error message."""
    return printable((str(error).splitlines() or [type(error).__name__])[0][:120])
