"""Dataclasses as JSON and back: what fits, what may be missing, and what is said of the rest."""

from dataclasses import dataclass, replace
from typing import Annotated

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from ppx.convert.schema import number
from ppx.convert.typed_json import MAY_BE_MISSING, NOT_STORED, Key, from_json, mapped, to_json

Share = Annotated[float, number(0, 1)]


@dataclass(frozen=True)
class Inner:
    name: str
    share: Share | None


@dataclass(frozen=True, kw_only=True)
class Outer:
    inner: Inner
    rows: tuple[Inner, ...]
    by_name: dict[str, int]
    flag: Annotated[bool, Key("stored_as")]
    later: Annotated[Inner | None, MAY_BE_MISSING]
    note: str | None = None
    count: int = 7
    scratch: Annotated[float, NOT_STORED] = 0.0


WHOLE = Outer(inner=Inner("a", 0.5), rows=(Inner("b", None),), by_name={"x": 1}, flag=True, later=None, scratch=3.0)
JSON = {
    "inner": {"name": "a", "share": 0.5},
    "rows": [{"name": "b", "share": None}],
    "by_name": {"x": 1},
    "stored_as": True,
    "later": None,
    "count": 7,
}


def test_there_and_back():
    assert to_json(WHOLE) == JSON
    assert list(to_json(WHOLE)) == list(JSON)  # in the order of the fields
    assert from_json(Outer, JSON) == replace(WHOLE, scratch=0.0)
    assert to_json(replace(WHOLE, note="n"))["note"] == "n"


def test_what_may_be_missing_and_what_is_ignored():
    earlier = {key: JSON[key] for key in JSON if key not in ("later", "count")} | {"unknown": object()}
    assert from_json(Outer, earlier) == replace(WHOLE, scratch=0.0)
    assert from_json(Outer, JSON | {"later": {"name": "c", "share": 1}}).later == Inner("c", 1)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"inner": {"name": "a"}}, "inner.share is missing"),
        ({"inner": {"name": "a", "share": 2}}, "inner.share is 2: a number from 0 to 1 is needed"),
        ({"rows": [{"name": "\x1b", "share": 1}]}, r"rows[0].name is '\x1b': a line of printable text is needed"),
        ({"rows": {}}, "rows is a dict: a list is needed"),
        ({"by_name": {"x": -1}}, "by_name.x is -1: a whole number of at least 0 is needed"),
        ({"by_name": {"\n": 1}}, r"by_name has the name '\n': printable text is needed"),
        ({"stored_as": 1}, "stored_as is 1: true or false is needed"),
        ({"count": "7"}, "count is '7': a whole number of at least 0 is needed"),
    ],
)
def test_what_does_not_fit_is_named(change, message):
    with pytest.raises(ValueError) as caught:  # noqa: PT011  (the whole message is compared)
        from_json(Outer, JSON | change)
    assert str(caught.value) == message


@settings(max_examples=50, deadline=None)
@given(st.builds(Inner, st.text("abc"), st.none() | st.floats(0, 1)), st.integers(0, 9), st.none() | st.text("xyz"))
def test_any_value_comes_back(inner, count, note):
    value = replace(WHOLE, inner=inner, rows=(inner, inner), count=count, note=note, scratch=0.0)
    assert from_json(Outer, to_json(value)) == value


def test_every_value_is_changed():
    changed = mapped(WHOLE, lambda value: 1 if isinstance(value, float) else value)
    assert changed == replace(WHOLE, inner=Inner("a", 1), scratch=0.0)
