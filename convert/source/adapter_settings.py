"""Rank and scaling of a LoRA adapter, from the side file that its trainer left beside it."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from ..errors import Problem, UserError, reason, refuse
from ..file_names import CONFIG
from ..regular_files import read_json, read_regular

RANK, SCALING = 128, 2.0  # moshi-finetune's
SIDE_FILES = (CONFIG, "adapter_config.json", "lora_config.json", "params.json", "config.yaml", "config.yml")
_RANK, _ALPHA = ("lora_rank", "rank", "r"), ("lora_alpha", "alpha")  # keys, in the order in which they are looked for
_SCALING = ("lora_scaling", "scaling", "scale")
_NESTED = ("lora", "lora_parameters")  # moshi-finetune's training settings, and mlx-lm's
_LARGEST = 1 << 20
_UNREAD = {  # of PEFT: settings that change what is added
    "use_dora": (False, None),
    "fan_in_fan_out": (False, None),
    "rank_pattern": ({}, None),
    "alpha_pattern": ({}, None),
    "bias": ("none", None),
    "modules_to_save": ([], None),
}


@dataclass(frozen=True)
class AdapterSettings:
    """What is known of an adapter beside its matrices; None where no side file gives it."""

    rank: int | None = None
    scaling: float | None = None


def read_settings(folder: Path) -> AdapterSettings:
    """Return rank and scaling from an adapter's folder: of the first of SIDE_FILES that gives one of them.

    The scaling is what B · A is multiplied by; ``alpha`` gives it as alpha/rank, or alpha/√rank with ``use_rslora``.
    Raises UserError for a side file that cannot be read, values that are no numbers, and kinds of LoRA not read here.
    """
    for name in SIDE_FILES:
        path = folder / name
        if path.is_file():
            settings = _settings(path, _parsed(path))
            if settings.rank is not None or settings.scaling is not None:
                return settings
    return AdapterSettings()


def _parsed(path: Path) -> Mapping[str, Any]:
    """Return the keys of a side file, those of its LoRA section before others."""
    try:
        data = read_json(path, _LARGEST) if path.suffix == ".json" else yaml.safe_load(read_regular(path, _LARGEST))
    except (ValueError, RecursionError, yaml.YAMLError) as error:
        raise UserError(_not_readable(path, reason(error))) from None
    if not isinstance(data, dict):
        raise UserError(_not_readable(path, f"holds a {type(data).__name__}"))
    sections = [data[key] for key in _NESTED if isinstance(data.get(key), dict)]
    return {key: value for section in (data, *sections) for key, value in section.items() if isinstance(key, str)}


def _not_readable(path: Path, why: str) -> Problem:
    return Problem(str(path), f"not an adapter's configuration ({why})", "correct it, or move it away")


def _settings(path: Path, keys: Mapping[str, Any]) -> AdapterSettings:
    rank = _number(path, keys, _RANK, "a whole number above 0", lambda v: type(v) is int and 0 < v <= 1 << 14)
    alpha = _number(path, keys, _ALPHA, "a number", _is_scale)
    scaling = _number(path, keys, _SCALING, "a number", _is_scale)
    if rank is None and alpha is None and scaling is None:
        return AdapterSettings()
    problems = [
        Problem(str(path), f"{key} is {keys[key]!r:.60}, and such an adapter is not read", "merge it into the weights")
        for key, allowed in _UNREAD.items()
        if key in keys and keys[key] not in allowed
    ]
    refuse(problems)
    if alpha is not None:
        if rank is None:
            raise UserError(f"{path}: gives alpha without a rank: add it as lora_rank")
        of_alpha = alpha / (math.sqrt(rank) if keys.get("use_rslora") is True else rank)
        if scaling is not None and not math.isclose(scaling, of_alpha, rel_tol=1e-6):
            both = f"gives the scaling {scaling:g}, and alpha and rank make it {of_alpha:g}"
            raise UserError(Problem(str(path), both, "correct it"))
        scaling = of_alpha
    return AdapterSettings(None if rank is None else int(rank), scaling)


def _is_scale(value: object) -> bool:
    return type(value) in (int, float) and 0 < abs(float(str(value))) < 1e6


def _number(path: Path, keys: Mapping[str, Any], names: tuple[str, ...], needed: str, fits: Any) -> float | None:
    """Return the value of the first key that is there; raises UserError for one that does not fit."""
    for name in names:
        if keys.get(name) is not None:
            if not fits(keys[name]):
                raise UserError(f"{path}: {name} is {keys[name]!r:.60}: {needed} is needed")
            value: float = keys[name]
            return value
    return None
