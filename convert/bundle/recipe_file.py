"""Recipes as TOML: read and checked whole, with the line of every mistake, and written."""

import json
import math
import re
import tomllib
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ...quant.affine import DEFAULT_METHOD, QuantizationConfig
from ..errors import Problem, UserError, check_name, refuse
from ..regular_files import read_regular
from ..source.tensors import COMPONENTS
from .ranges import Ranges, format_ranges, parse_ranges
from .recipe import DTYPES, LIMITS, Recipe, Rule
from .targets import DEFAULT as DEFAULT_TARGET
from .targets import TARGETS

_TOP = ("description", "target", "dtype", "depformer_steps", "rules", "parity")
_RULE = ("components", "modules", "layers", "steps", "bits", "group_size", "method", "keep")
_LARGEST = 1 << 20
Wrong = Callable[[str, str, int], None]  # told of a mistake: the key, the message, the number of the rule


def read(path: Path, target: str | None = None) -> Recipe:
    """Read a recipe, for another target than it names if one is given.

    Raises UserError that lists all of its mistakes, each with its line.
    """
    try:
        text = read_regular(path, _LARGEST).decode("utf-8").replace("\r\n", "\n").replace("\r", "\n")
    except (OSError, ValueError):  # other encodings
        raise UserError(f"{path}: not a text file that can be read: give a recipe in TOML") from None
    return parse(text, check_name(path.stem, "the recipe"), str(path), target)


def parse(text: str, name: str, where: str, override: str | None = None) -> Recipe:
    """Parse a recipe; ``where`` is what messages call it, ``override`` a target in place of its own."""
    try:
        data = tomllib.loads(text)
    except (ValueError, RecursionError) as error:  # TOMLDecodeError is one; numbers of 5000 digits are another
        raise UserError(f"{where}: not TOML: {error}") from None
    lines = _lines(text)
    problems: list[tuple[int, Problem]] = []

    def wrong(key: str, message: str, rule: int = -1) -> None:
        line = lines.get((rule, key)) or lines.get((rule, ""), 1)
        problems.append((line, Problem(f"{where}, line {line}", message)))

    for key in data:
        if key not in _TOP:
            wrong(key, f"unknown key {key!r}: use {', '.join(_TOP)}")
    target = override or data.get("target", DEFAULT_TARGET)
    if not isinstance(target, str) or target not in TARGETS:
        target = DEFAULT_TARGET
        wrong("target", f"target is {data.get('target')!r}: use one of {', '.join(TARGETS)}")
    dtype = data.get("dtype", TARGETS[target].dtype)
    if not isinstance(dtype, str) or dtype not in DTYPES:
        wrong("dtype", f"dtype is {dtype!r}: use one of {', '.join(DTYPES)}")
    kept = data.get("depformer_steps")
    if kept is not None and (type(kept) is not int or kept < 1):
        wrong("depformer_steps", f"depformer_steps is {kept!r}: a whole number is needed")
    description = data.get("description", "")
    if not isinstance(description, str):
        wrong("description", "description is not a string")
    raw = data.get("rules", [])
    if not isinstance(raw, list) or not all(isinstance(rule, dict) for rule in raw):
        wrong("rules", "rules is not a list of tables: write [[rules]] above each rule")
        raw = []
    rules = [_rule(rule, number, lines.get((number, ""), 0), wrong) for number, rule in enumerate(raw)]
    parity = data.get("parity", {})
    if not isinstance(parity, dict):
        wrong("parity", "parity is not a table: write [parity]")
        parity = {}
    for key, value in parity.items():
        if key not in LIMITS:
            wrong(f"parity.{key}", f"unknown limit {key!r}: use {', '.join(LIMITS)}")
        elif not _is_limit(value):
            wrong(f"parity.{key}", f"{key} is {value!r}: a number of at least 0 is needed")
    refuse([problem for _, problem in sorted(problems, key=lambda pair: (pair[0], pair[1].message))])
    return Recipe(name, str(target), str(dtype), tuple(rules), str(description), parity, text, kept)


def limits_in(text: str) -> dict[str, float]:
    """Return the limits that a recipe's text sets, by figure. Skips what is not a limit and ignores all other keys.

    Manifests of any version hold such texts: one that is not TOML sets no limits.
    """
    try:
        parity = tomllib.loads(text).get("parity")
    except (ValueError, RecursionError):
        return {}
    return {key: parity[key] for key in LIMITS if _is_limit(parity.get(key))} if isinstance(parity, dict) else {}


def _is_limit(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and 0 <= value < math.inf


def _rule(data: dict[str, Any], number: int, line: int, wrong: Wrong) -> Rule:
    """Read one rule; tells ``wrong(key, message, rule)`` of every mistake."""
    for key in data:
        if key not in _RULE:
            wrong(key, f"unknown key {key!r} in a rule: use {', '.join(_RULE)}", number)
    components = _names(data, "components", number, wrong)
    for component in components:
        if component not in COMPONENTS:
            wrong("components", f"unknown component {component!r}: use {', '.join(COMPONENTS)}", number)
    keep = data.get("keep", False)
    quantization = None
    if keep is True:
        for key in ("bits", "group_size", "method"):
            if key in data:
                wrong(key, f"{key} beside keep = true: a rule quantizes or keeps", number)
    elif keep is not False:
        wrong("keep", f"keep is {keep!r}: use true", number)
    else:
        for key in ("bits", "group_size"):
            if key not in data:
                wrong("", f"a rule has no {key}: add it, or keep = true", number)
        quantization = QuantizationConfig(
            data.get("bits", 4), data.get("group_size", 64), data.get("method", DEFAULT_METHOD)
        )
        for key, problem in quantization.problems().items():
            wrong(key, f"{key} {problem}", number)
    layers, steps = (_ranges(data, key, number, wrong) for key in ("layers", "steps"))
    return Rule(quantization, components, _names(data, "modules", number, wrong), layers, steps, line)


def _names(data: dict[str, Any], key: str, number: int, wrong: Wrong) -> tuple[str, ...]:
    value = data.get(key, [])
    value = [value] if isinstance(value, str) else value
    if not isinstance(value, list) or not all(isinstance(name, str) for name in value):
        wrong(key, f"{key} is {value!r}: a list of names is needed", number)
        return ()
    if key in data and not value:
        wrong(key, f"{key} is empty: leave it out to mean all", number)
    return tuple(value)


def _ranges(data: dict[str, Any], key: str, number: int, wrong: Wrong) -> Ranges:
    if key not in data:
        return ()
    try:
        return parse_ranges(str(data[key]))
    except ValueError as error:
        wrong(key, f"{key} is {data[key]!r}: {error}", number)
        return ()


def _lines(text: str) -> dict[tuple[int, str], int]:
    """Return the line of each key: (number of its rule or -1, key); a rule's own line stands under an empty key."""
    lines: dict[tuple[int, str], int] = {}
    rule, prefix = -1, ""
    count = 0
    for number, line in enumerate(text.splitlines(), 1):
        if re.match(r"\s*\[\[\s*rules\s*\]\]", line):
            rule, prefix = count, ""
            count += 1
            lines[rule, ""] = number
        elif table := re.match(r"\s*\[\s*([\w.-]+)\s*\]", line):
            rule, prefix = -1, f"{table[1]}."
            lines[-1, table[1]] = number
        elif key := re.match(r"\s*[\"']?([\w-]+)[\"']?\s*=", line):
            lines.setdefault((rule, prefix + key[1]), number)
    return lines


def to_toml(recipe: Recipe) -> str:
    """Write a recipe as the TOML text that ``parse`` reads."""
    pairs = (("description", recipe.description), ("target", recipe.target), ("dtype", recipe.dtype))
    lines = [f"{key} = {json.dumps(value, ensure_ascii=False)}" for key, value in pairs]
    if recipe.depformer_steps is not None:
        lines.append(f"depformer_steps = {recipe.depformer_steps}")
    for rule in recipe.rules:
        lines += ["", "[[rules]]"]
        lines += [
            f"{key} = {json.dumps(list(values), ensure_ascii=False)}"
            for key, values in (("components", rule.components), ("modules", rule.modules))
            if values
        ]
        lines += [
            f'{key} = "{format_ranges(ranges)}"'
            for key, ranges in (("layers", rule.layers), ("steps", rule.steps))
            if ranges
        ]
        if rule.quantization is None:
            lines.append("keep = true")
        else:
            lines += [f"bits = {rule.quantization.bits}", f"group_size = {rule.quantization.group_size}"]
            lines.append(f'method = "{rule.quantization.method}"')
    if recipe.parity:
        lines += ["", "[parity]"] + [f"{key} = {value}" for key, value in recipe.parity.items()]
    return "\n".join(lines) + "\n"
