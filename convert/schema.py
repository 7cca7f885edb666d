"""What parsed JSON from others must look like: nested dictionaries and lists, with a test at each leaf."""

import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

Schema = Any  # a Leaf, Each, OrNull, Maybe, a list of one schema, or a dictionary of schemas; other keys are allowed


@dataclass(frozen=True)
class Leaf:
    """A value that passes a test. what: what is needed, for people."""

    what: str
    test: Callable[[Any], bool]


@dataclass(frozen=True)
class Each:
    """A dictionary with any printable keys, whose values fit a schema."""

    schema: Schema


@dataclass(frozen=True)
class OrNull:
    """Null, or what fits a schema; the key must be there."""

    schema: Schema


@dataclass(frozen=True)
class Maybe(OrNull):
    """Null, a missing key, or what fits a schema."""


def number(low: float = -math.inf, high: float = math.inf) -> Leaf:
    """Return the schema of a finite number in a range, its ends included."""
    if low == -math.inf:
        what = "a finite number"
    else:
        what = f"a number of at least {low:g}" if high == math.inf else f"a number from {low:g} to {high:g}"
    return Leaf(what, lambda value: type(value) in (int, float) and low <= value <= high and abs(value) < math.inf)


def whole(low: int = 0, high: int = 1 << 62) -> Leaf:
    """Return the schema of a whole number in a range, its ends included."""
    what = f"a whole number of at least {low}"
    return Leaf(what, lambda value: type(value) is int and low <= value <= high)


TEXT = Leaf("a line of printable text", lambda value: isinstance(value, str) and value.isprintable())
SHA256 = Leaf("a sha256", lambda value: isinstance(value, str) and re.fullmatch("[0-9a-f]{64}", value) is not None)
FILE = {"size": whole(), "sha256": SHA256}
TRUTH = Leaf("true or false", lambda value: isinstance(value, bool))


def mismatch(value: Any, schema: Schema, path: str = "") -> str | None:
    """Return a sentence on the first place where a value does not fit its schema, None if it fits."""
    here = path or "it"
    if isinstance(schema, Leaf):
        return None if schema.test(value) else f"{here} is {_shown(value)}: {schema.what} is needed"
    if isinstance(schema, OrNull):
        return None if value is None else mismatch(value, schema.schema, path)
    if isinstance(schema, list):
        if not isinstance(value, list):
            return f"{here} is {_shown(value)}: a list is needed"
        pairs = [(f"{path}[{place}]", inner, schema[0]) for place, inner in enumerate(value)]
    elif not isinstance(value, Mapping):
        return f"{here} is {_shown(value)}: names with values are needed"
    elif isinstance(schema, Each):
        if wrong := [key for key in value if not key.isprintable()]:
            return f"{here} has the name {ascii(wrong[0])[:60]}: printable text is needed"
        pairs = [(_joined(path, key), inner, schema.schema) for key, inner in value.items()]
    else:
        missing = [key for key in schema if key not in value and not isinstance(schema[key], Maybe)]
        if missing:
            return f"{_joined(path, missing[0])} is missing"
        pairs = [(_joined(path, key), value.get(key), inner) for key, inner in schema.items()]
    return next((found for place, inner, of in pairs if (found := mismatch(inner, of, place))), None)


def _joined(path: str, key: str) -> str:
    return f"{path}.{key}" if path else key


def _shown(value: Any) -> str:
    if isinstance(value, dict | list):
        return f"a {type(value).__name__}"
    return ascii(value)[:60]
