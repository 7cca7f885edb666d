"""Frozen dataclasses as JSON and back: a field's annotation says what its value in a file from others must look like.

``float`` must be a finite number, ``int`` a whole one that is not negative, ``str`` a line of printable text; lists,
tuples, dictionaries, ``| None`` and other dataclasses nest. ``Annotated[float, number(0, 1)]`` names another schema. A
field with a default may be missing, and is not written while it is None.
"""

from collections.abc import Callable, Mapping
from dataclasses import MISSING, Field, dataclass, fields, is_dataclass
from functools import cache
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

from .schema import TEXT, TRUTH, Each, Leaf, Maybe, OrNull, Schema, mismatch, number, whole

T = TypeVar("T")
NOT_STORED: Literal["not stored"] = "not stored"  # annotates what is needed in memory only
MAY_BE_MISSING: Literal["may be missing"] = "may be missing"  # in files of earlier versions; written even if it is None


@dataclass(frozen=True)
class Key:
    """Annotates a field whose key in JSON is not its name."""

    name: str


def from_json(kind: type[T], data: Any) -> T:
    """Return parsed JSON as a dataclass; other keys are ignored.

    Raises ValueError with a sentence on the first place that does not fit.
    """
    if problem := mismatch(data, schema_of(kind)):
        raise ValueError(problem)
    made: T = _made(kind, data)
    return made


def to_json(value: Any) -> Any:
    """Return a dataclass, or what holds some, as dictionaries and lists."""
    kind: Any = type(value)
    if _is_record(kind):
        pairs = [(field, getattr(value, field.name)) for field, _ in _stored(kind)]
        return {_key(field, kind): to_json(inner) for field, inner in pairs if not _is_left_out(field, inner)}
    if isinstance(value, Mapping):
        return {key: to_json(inner) for key, inner in value.items()}
    return [to_json(inner) for inner in value] if isinstance(value, list | tuple) else value


def mapped(value: T, change: Callable[[Any], Any]) -> T:
    """Return a dataclass with all its numbers and texts changed; what is not stored gets its default."""
    return _mapped(value, change)  # type: ignore[no-any-return]


def _mapped(value: Any, change: Callable[[Any], Any]) -> Any:
    kind: Any = type(value)
    if _is_record(kind):
        names = [field.name for field, _ in _stored(kind)]
        return kind(**{name: _mapped(getattr(value, name), change) for name in names})
    if isinstance(value, Mapping):
        return {key: _mapped(inner, change) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return kind(_mapped(inner, change) for inner in value)
    return change(value)


def schema_of(kind: Any) -> Schema:
    """Return the schema of a type."""
    if _is_record(kind):
        return _dataclass_schema(kind)
    origin, inner = get_origin(kind), get_args(kind)
    if origin is Annotated:
        given = [one for one in inner[1:] if isinstance(one, Leaf | Each | OrNull | dict)]
        return given[0] if given else schema_of(inner[0])
    if origin in (Union, UnionType):
        return OrNull(schema_of(_without_none(kind)))
    if origin in (list, tuple):
        return [schema_of(inner[0])]
    if origin is dict:
        return Each(schema_of(inner[1]))
    return {str: TEXT, bool: TRUTH, int: whole(), float: number()}[kind]


def _dataclass_schema(kind: Any) -> Schema:
    return {_key(field, kind): _field_schema(field, hint) for field, hint in _stored(kind)}


def _field_schema(field: "Field[Any]", hint: Any) -> Schema:
    schema = schema_of(hint)
    optional = _has_default(field) or MAY_BE_MISSING in _notes(hint)
    return Maybe(schema.schema if isinstance(schema, OrNull) else schema) if optional else schema


def _made(hint: Any, data: Any) -> Any:
    """Return parsed JSON that fits a type as a value of it."""
    if data is None:
        return None
    if _is_record(hint):
        values = {field.name: (data.get(_key(field, hint)), field, inner) for field, inner in _stored(hint)}
        return hint(
            **{
                name: _made(inner, value)
                for name, (value, field, inner) in values.items()
                if value is not None or not _has_default(field)
            }
        )
    origin, inner = get_origin(hint), get_args(hint)
    if origin is Annotated:
        return _made(inner[0], data)
    if origin in (Union, UnionType):
        return _made(_without_none(hint), data)
    if origin in (list, tuple):
        return origin(_made(inner[0], one) for one in data)
    if origin is dict:
        return {key: _made(inner[1], one) for key, one in data.items()}
    return data


@cache
def _stored(kind: Any) -> list[tuple["Field[Any]", Any]]:
    """Return the stored fields of a dataclass, and their annotations."""
    hints = get_type_hints(kind, include_extras=True)
    pairs = [(field, hints[field.name]) for field in fields(kind)]
    return [(field, hint) for field, hint in pairs if NOT_STORED not in _notes(hint)]


def _notes(hint: Any) -> tuple[Any, ...]:
    return get_args(hint)[1:] if get_origin(hint) is Annotated else ()


@cache
def _keys(kind: Any) -> dict[str, str]:
    keys = {field.name: [one.name for one in _notes(hint) if isinstance(one, Key)] for field, hint in _stored(kind)}
    return {name: key[0] if key else name for name, key in keys.items()}


def _key(field: "Field[Any]", kind: Any) -> str:
    return _keys(kind)[field.name]


def _has_default(field: "Field[Any]") -> bool:
    return field.default is not MISSING or field.default_factory is not MISSING


def _is_left_out(field: "Field[Any]", value: Any) -> bool:
    return value is None and _has_default(field)


def _without_none(hint: Any) -> Any:
    (kind,) = (one for one in get_args(hint) if one is not NoneType)
    return kind


def _is_record(kind: Any) -> bool:  # which mypy does not take for more than it is
    return is_dataclass(kind)
