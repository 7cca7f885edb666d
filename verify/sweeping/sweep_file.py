"""``sweep.toml``: read and checked whole, all mistakes at once. ``docs/sweeps.md`` describes every key."""

import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ...calibrate.allocation import request_of, size_of
from ...calibrate.size_budget import budget_of
from ...convert.bundle.recipe_choice import make_recipe
from ...convert.errors import Problem, UserError
from ...convert.regular_files import read_regular
from ...convert.source import demo
from ...convert.source.source import HUB_ID
from ...model.tokens import CALIBRATION_FRAMES
from ...quant.affine import BITS, METHOD_NAMES, METHODS, stored_method
from .settings import (
    NAME,
    NO_DATA,
    URL,
    CalibrationSet,
    Evaluation,
    Pattern,
    Resources,
    Sweep,
    SweepRecipe,
    SweepSource,
)

_LARGEST = 1 << 20  # bytes
_MANY = 1000  # entries of a list
_TOP = ("sources", "recipes", "methods", "calibration", "evaluation", "resources", "exclude", "include")
_ABSENT: Any = object()


@dataclass
class _Reader:
    """Collects the mistakes of a file while it is read."""

    path: Path
    problems: list[Problem]

    def wrong(self, place: str, message: str, hint: str = "") -> None:
        self.problems.append(Problem(f"{self.path}: {place}" if place else str(self.path), message, hint))

    def keys(self, table: Mapping[str, Any], place: str, allowed: Sequence[str]) -> None:
        for key in table:
            if key not in allowed:
                self.wrong(place, f"unknown key {key!r}: use {', '.join(allowed)}")

    def value(self, table: Mapping[str, Any], key: str, place: str, kind: type, default: Any = None) -> Any:
        """Return a value of a type; the default where it is missing or wrong."""
        value = table.get(key, _ABSENT)
        if value is _ABSENT:
            return default
        fits = isinstance(value, kind) and (kind is bool or not isinstance(value, bool))
        if kind is float and type(value) is int:
            fits, value = True, float(value)
        if fits and (kind is not str or (value and value.isprintable())):
            return value
        what = {str: "a line of text", int: "a whole number", float: "a number", bool: "true or false"}[kind]
        self.wrong(place, f"{key} is {value!r:.60}: {what} is needed")
        return default

    def number(self, table: Mapping[str, Any], key: str, place: str, low: int, high: int, default: Any = None) -> Any:
        """Return a whole number in a range; the default where it is missing or wrong."""
        value = self.value(table, key, place, int, default)
        if value is not default and not low <= value <= high:
            self.wrong(place, f"{key} is {value}: a whole number from {low} to {high} is needed")
            return default
        return value

    def tables(self, data: Mapping[str, Any], key: str) -> list[Mapping[str, Any]]:
        value = data.get(key, [])
        if not isinstance(value, list) or not all(isinstance(one, dict) for one in value):
            self.wrong(key, f"is not a list of tables: write [[{key}]] above each")
            return []
        if len(value) > _MANY:
            self.wrong(key, f"has {len(value)} entries: at most {_MANY} are read")
        return value[:_MANY]

    def table(self, data: Mapping[str, Any], key: str) -> Mapping[str, Any]:
        value = data.get(key, {})
        if not isinstance(value, dict):
            self.wrong(key, f"is not a table: write [{key}]")
            return {}
        return value

    def items(self, table: Mapping[str, Any], key: str, place: str, kind: type) -> list[Any]:
        value = table.get(key, [])
        if not isinstance(value, list) or not all(type(one) is kind for one in value):
            self.wrong(place, f"{key} is {value!r:.60}: a list of {'texts' if kind is str else 'numbers'} is needed")
            return []
        return value

    def name(self, given: str, place: str, others: set[str]) -> str:
        """Return a name that can be a folder and is not another one's; case does not count, as on macOS."""
        if not NAME.fullmatch(given) or given.lower() == NO_DATA:
            self.wrong(
                place, f"name {given!r:.80}: letters, digits, and . _ - are needed", 'give another: name = "..."'
            )
        elif given.lower() in others:
            self.wrong(place, f"name {given!r} is there already", 'give each its own: name = "..."')
        others.add(given.lower())
        return given

    def file(self, given: str, place: str) -> Path:
        """Return a file that must be there; relative to the sweep's own file."""
        path = self.path.parent / _expanded(given)
        if not path.is_file():
            self.wrong(place, f"{given}: no such file", "paths are relative to the sweep's file")
        return path


def read(path: Path) -> Sweep:
    """Read a sweep; raises UserError that lists all of its mistakes, those of its recipes included."""
    try:
        data = tomllib.loads(read_regular(path, _LARGEST).decode("utf-8"))
    except UnicodeDecodeError:
        raise UserError(f"{path}: not a text file in UTF-8: give a sweep in TOML") from None
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path}: not TOML: {error}") from None
    reader = _Reader(path, [])
    reader.keys(data, "", _TOP)
    sources, recipes, sets = set[str](), set[str](), set[str]()
    sweep = Sweep(
        sources=tuple(
            _source(reader, table, f"source {index}", sources)
            for index, table in enumerate(reader.tables(data, "sources"), 1)
        ),
        recipes=tuple(
            recipe
            for index, table in enumerate(reader.tables(data, "recipes"), 1)
            if (recipe := _recipe(reader, table, f"recipe {index}", recipes))
        ),
        methods=_methods(reader, data),
        calibrations=tuple(
            _calibration(reader, table, f"calibration {index}", sets)
            for index, table in enumerate(reader.tables(data, "calibration"), 1)
        ),
        evaluation=_evaluation(reader, reader.table(data, "evaluation")),
        resources=_resources(reader, reader.table(data, "resources")),
    )
    for key in ("sources", "recipes"):
        if not data.get(key):
            reader.wrong("", f"has no {key}", f"write [[{key}]] and its keys")
    names = {"source": sources, "recipe": recipes, "calibration": sets | {NO_DATA}}
    exclude, include = (
        tuple(
            _pattern(reader, table, f"{key} {index}", names, key == "include")
            for index, table in enumerate(reader.tables(data, key), 1)
        )
        for key in ("exclude", "include")
    )
    if reader.problems:
        raise UserError(reader.problems)
    return replace(sweep, exclude=exclude, include=include)


def _expanded(where: str) -> Path:
    try:
        return Path(where).expanduser()
    except RuntimeError:  # ~somebody
        return Path(where)


def _source(reader: _Reader, table: Mapping[str, Any], place: str, others: set[str]) -> SweepSource:
    reader.keys(table, place, ("name", "source", "revision", "adapter", "fill_depformer_steps"))
    where = reader.value(table, "source", place, str, "")
    if not where and "source" not in table:
        reader.wrong(place, "has no source", "give a Hub id, a folder, demo, or a URL")
    path = (
        reader.path.parent / _expanded(where)
        if where and not URL.fullmatch(where) and where not in demo.SIZES
        else None
    )
    if path and path.is_dir():
        where = str(path)
    elif path and not HUB_ID.fullmatch(where):
        reader.wrong(place, f"{where}: neither a folder nor a Hub id", "paths are relative to the sweep's file")
    revision = reader.value(table, "revision", place, str)
    if revision and (path is None or path.is_dir()):
        reader.wrong(place, f"a revision has no effect for {where}, which is not on the Hub: leave it out")
    adapter = reader.value(table, "adapter", place, str)
    if adapter and (reader.path.parent / adapter).exists():
        adapter = str(reader.path.parent / adapter)
    default = (Path(where).resolve().name if path else where.rstrip("/").rpartition("/")[2]).replace(":", "-")
    name = reader.name(reader.value(table, "name", place, str, default), place, others) if where else ""
    return SweepSource(
        name, where, revision, adapter, reader.value(table, "fill_depformer_steps", place, bool, default=False)
    )


def _recipe(reader: _Reader, table: Mapping[str, Any], place: str, others: set[str]) -> SweepRecipe | None:
    sized = ("target_size", "bits_per_weight")
    usual = ("name", "target", "dtype", "depformer_steps")
    before = len(reader.problems)
    reader.keys(table, place, ("recipe", "bits", "group_size", "quantize", "keep", *sized, *usual))
    text = {key: reader.value(table, key, place, str) for key in ("recipe", "target", "dtype", "target_size")}
    whole = {key: reader.value(table, key, place, int) for key in ("bits", "group_size", "depformer_steps")}
    quantize = reader.value(table, "quantize", place, bool, default=True)
    bits_per_weight = reader.value(table, "bits_per_weight", place, float)
    keep, name = reader.items(table, "keep", place, str), reader.value(table, "name", place, str)
    if len(reader.problems) > before:
        return None
    given = [key for key in ("recipe", "bits", *sized) if key in table] + ([] if quantize else ["quantize = false"])
    if len(given) != 1:
        reader.wrong(
            place, f"{' and '.join(given) or 'nothing'} is given", f"give one of recipe, bits, {', '.join(sized)}"
        )
        return None
    settings: dict[str, Any] = {"depformer_steps": whole["depformer_steps"]}
    try:
        if given[0] in sized:
            if bits_per_weight is not None and not 1 <= bits_per_weight <= 32:
                raise UserError(f"bits_per_weight is {bits_per_weight:g}: a number from 1 to 32 is needed")
            budget = budget_of(text["target_size"] and size_of(text["target_size"]), bits_per_weight)
            assert budget is not None  # noqa: S101  (one of both is given)
            request = request_of(budget, text["target"], text["dtype"], None, keep=keep, **settings)
            recipe = request.recipe
        else:
            if keep:
                raise UserError("keep has no effect without a size: leave it out")
            request = None
            file = text["recipe"]
            if file and file.endswith(".toml"):
                file = str(reader.path.parent / file)
            settings |= {"bits": whole["bits"], "group_size": whole["group_size"], "quantize": quantize}
            recipe = make_recipe(file, target=text["target"], dtype=text["dtype"], **settings)
    except (UserError, KeyError) as error:
        problems = error.problems if isinstance(error, UserError) else [f"target {error}: there is no such target"]
        for problem in problems:
            reader.wrong(place, str(problem))
        return None
    return SweepRecipe(reader.name(name or recipe.name, place, others), recipe, request)


def _methods(reader: _Reader, data: Mapping[str, Any]) -> tuple[str, ...]:
    methods = reader.items(data, "methods", "", str)
    for method in methods:
        if method not in (*METHOD_NAMES, *METHODS):
            reader.wrong("methods", f"unknown method {method!r}: use {', '.join(METHOD_NAMES)}")
    return tuple(dict.fromkeys(stored_method(method) for method in methods if method in (*METHOD_NAMES, *METHODS)))


def _calibration(reader: _Reader, table: Mapping[str, Any], place: str, others: set[str]) -> CalibrationSet:
    reader.keys(table, place, ("name", "tokens", "audio", "sessions", "frames"))
    name = reader.name(reader.value(table, "name", place, str, "self-generated"), place, others)
    tokens, audio = (
        tuple(reader.file(one, place) for one in reader.items(table, key, place, str)) for key in ("tokens", "audio")
    )
    sessions = reader.number(table, "sessions", place, 1, 100_000)
    if sessions and (tokens or audio):
        reader.wrong(place, "sessions is for self-generated tokens: leave it out, or the token files and recordings")
    frames = reader.number(table, "frames", place, 1, 100_000, CALIBRATION_FRAMES)
    return CalibrationSet(name, tokens, audio, sessions, frames)


def _evaluation(reader: _Reader, table: Mapping[str, Any]) -> Evaluation:
    place = "evaluation"
    reader.keys(table, place, ("tokens", "sequences", "frames", "controls"))
    tokens = reader.value(table, "tokens", place, str)
    controls = tuple(reader.items(table, "controls", place, int))
    if wrong := [bits for bits in controls if bits not in BITS]:
        reader.wrong(place, f"controls of {wrong[0]} bit: use {', '.join(map(str, BITS))}")
    return Evaluation(
        tokens and reader.file(tokens, place),
        reader.number(table, "sequences", place, 1, 1_000_000),
        reader.number(table, "frames", place, 2, 1_000_000),
        controls,
    )


def _resources(reader: _Reader, table: Mapping[str, Any]) -> Resources:
    place = "resources"
    reader.keys(table, place, ("cores", "memory", "gpus", "retries"))
    memory, text = 0, reader.value(table, "memory", place, str)
    try:
        memory = size_of(text) if text else 0
    except UserError as error:
        reader.wrong(place, f"memory: {error}")
    gpus = reader.value(table, "gpus", place, float, 0.0)
    if not (0 <= gpus <= 64) or (gpus > 1 and gpus != int(gpus)):
        reader.wrong(place, f"gpus is {gpus:g}: a whole number, or a share of one, is needed")
    cores = reader.number(table, "cores", place, 1, 256, Resources.cores)
    return Resources(cores, memory, gpus, reader.number(table, "retries", place, 0, 100, Resources.retries))


def _pattern(
    reader: _Reader, table: Mapping[str, Any], place: str, names: Mapping[str, set[str]], exact: bool
) -> Pattern:
    reader.keys(table, place, tuple(Pattern.__dataclass_fields__))
    values = {key: reader.value(table, key, place, str, "") for key in Pattern.__dataclass_fields__}
    if not any(values.values()):
        reader.wrong(place, "names nothing", "give source, recipe, method or calibration")
    if exact:
        for key in ("source", "recipe"):
            if values[key].lower() not in names[key]:
                reader.wrong(
                    place, f"{key} is {values[key]!r:.60}: there is no such {key}", "an included cell names both"
                )
        if values["calibration"] and values["calibration"].lower() not in names["calibration"]:
            reader.wrong(place, f"calibration is {values['calibration']!r:.60}: there is no such calibration set")
    if values["method"]:
        if exact and values["method"] not in (*METHOD_NAMES, *METHODS):
            reader.wrong(place, f"unknown method {values['method']!r:.60}: use {', '.join(METHOD_NAMES)}")
        elif values["method"] in METHOD_NAMES:
            values["method"] = stored_method(values["method"])
    return Pattern(**values)
