"""Mistakes of the user's, or of a source: said in full, without a traceback."""

from collections.abc import Iterable, Sequence


class UserError(Exception):
    """Something that the user can mend: one sentence a problem, each with what was found and what to do next."""

    def __init__(self, problems: str | Iterable[str]) -> None:
        self.problems = [problems] if isinstance(problems, str) else list(problems)
        super().__init__("\n".join(self.problems))


def printable(text: str) -> str:
    """Return a text in which nothing can command a terminal, or fail to be written as UTF-8."""
    return "".join(character if character.isprintable() else "\ufffd" for character in text)


def check_name(name: str, what: str) -> str:
    """Return a name that goes into a manifest; raises UserError for one that cannot be printed, or is not UTF-8."""
    if not name.isprintable():
        raise UserError(f"{what} {name!a}: its name holds what cannot be printed: rename it")
    return name


def reason(error: Exception) -> str:
    """Return the first line of what a library says went wrong."""
    return printable((str(error).splitlines() or [type(error).__name__])[0][:120])


def refuse(problems: Sequence[str]) -> None:
    """Raise UserError with all problems, if there are any."""
    if problems:
        raise UserError(problems)


class CheckFailed(Exception):  # noqa: N818  (it names what happened to the user's bundle)
    """A check of something that was written or published did not pass."""
