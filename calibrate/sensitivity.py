"""How much a model's predictions suffer when one part of it is quantized and the rest is not; kept in a file."""

import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..convert.bundle.workspace import write_durably
from ..convert.errors import UserError
from ..convert.regular_files import read_json
from ..convert.source.architecture import Architecture
from ..convert.source.tensors import COMPONENTS, Role, roles
from ..quant.affine import BITS, GROUP_SIZES, QuantizationConfig

STREAMS = ("text", "agent")
_VERSION = 1
_LARGEST = 1 << 24  # bytes of a file


@dataclass(frozen=True, order=True)
class Part:
    """What gets one setting. modules: a shell pattern. layer, step: None where they do not tell parts apart."""

    component: str
    modules: str
    layer: int | None = None
    step: int | None = None

    def __str__(self) -> str:
        where = [
            f" {kind} {number}" for kind, number in (("layer", self.layer), ("step", self.step)) if number is not None
        ]
        return f"{self.component} {self.modules}{''.join(where)}"


@dataclass(frozen=True)
class Sensitivities:
    """What was measured. costs: divergence of text and agent, in nats a token, by part and bits.

    errors: relative squared error of a part's weights, by part, bits and group size; the divergence is taken to grow
    with it. material: what was read: of ``available`` sequences so many ``sequences``, of ``frames`` each. mark: what
    stands for the source and the material.
    """

    token_set: dict[str, Any]
    mark: str = ""
    costs: dict[Part, dict[int, dict[str, float]]] = field(default_factory=dict)
    errors: dict[Part, dict[tuple[int, int], float]] = field(default_factory=dict)

    @property
    def measured_on(self) -> str:
        """How much of which material was read, in words."""
        used, there = self.token_set["sequences"], self.token_set.get("available")
        count = f"{used} of {there}" if there else f"{used}"
        return f"{count} sequence{'s' if (there or used) > 1 else ''} of {self.token_set['frames']} frames"

    def cost(self, part: Part, quantization: QuantizationConfig | None) -> dict[str, float] | None:
        """Return what a part's setting costs each stream; None where its rows are not divided by the group size."""
        if quantization is None or part not in self.costs:
            return dict.fromkeys(STREAMS, 0.0)
        errors = self.errors[part]
        if (quantization.bits, quantization.group_size) not in errors:
            return None
        measured = errors[quantization.bits, usual_group(errors)]
        grown = errors[quantization.bits, quantization.group_size] / measured if measured else 1.0
        return {stream: grown * value for stream, value in self.costs[part][quantization.bits].items()}


def usual_group(errors: Mapping[tuple[int, int], float]) -> int:
    """Return the group size at which a part was measured."""
    sizes = {size for _, size in errors}
    return 64 if 64 in sizes else max(sizes)


def part_of(role: Role, step: int | None) -> Part:
    """Return the part that an output of this role and depformer step belongs to."""
    within = role.module.partition(".")[0] + ".*" if "." in role.module else role.module
    if role.component == "embeddings":
        return Part("embeddings", role.module)
    return Part(role.component, within, role.layer if role.component == "temporal" else None, step)


def members_of(architecture: Architecture) -> dict[Part, list[tuple[str, int | None]]]:
    """Return the tensors, and rows of stacked ones, of each part that the agent's predictions depend on."""
    half, found = architecture.n_q // 2, dict[Part, list[tuple[str, int | None]]]()
    for name, role in roles(architecture).items():
        if role.kind == "norm":
            continue
        stacked = range(role.stacked) if role.stacked > 1 else [None]
        for index in stacked:
            step = role.step if index is None else index
            if step is None or step < half:
                found.setdefault(part_of(role, step), []).append((name, index))
    return found


def settings_of(columns: Iterable[int]) -> dict[tuple[int, int], float]:
    """Return an entry for each setting whose group size divides all columns."""
    widths = set(columns)
    sizes = [size for size in GROUP_SIZES if not any(width % size for width in widths)]
    return {(bits, size): 0.0 for bits in BITS for size in sizes}


def write(found: Sensitivities, path: Path) -> None:
    """Write a file of sensitivities, whole or not at all."""
    parts = [
        {
            "component": part.component,
            "modules": part.modules,
            "layer": part.layer,
            "step": part.step,
            "divergence": {str(bits): streams for bits, streams in costs.items()},
            "error": {f"{bits}-{size}": error for (bits, size), error in found.errors[part].items()},
        }
        for part, costs in found.costs.items()
    ]
    said = {"sensitivities": _VERSION, "mark": found.mark, "material": found.token_set, "parts": parts}
    write_durably(path, json.dumps(said, indent=1) + "\n")


def read(path: Path) -> Sensitivities:
    """Read a file of sensitivities; raises UserError for anything else."""
    wrong = UserError(f"{path}: not a file of sensitivities: give another, or let it be measured anew")
    try:
        held = read_json(path, _LARGEST)
        if held["sensitivities"] != _VERSION:
            raise wrong
        found = Sensitivities(dict(held["material"]), str(held["mark"]))
        amounts = [found.token_set["sequences"], found.token_set["frames"], found.token_set.get("available", 1)]
        if not all(type(amount) is int and amount > 0 for amount in amounts):
            raise wrong
        for entry in held["parts"]:
            part = Part(*(entry[key] for key in ("component", "modules", "layer", "step")))
            numbers = (part.layer, part.step)
            if part.component not in COMPONENTS or not all(type(number) in (int, type(None)) for number in numbers):
                raise wrong
            costs = {
                bits: {stream: _number(entry["divergence"][str(bits)][stream]) for stream in STREAMS} for bits in BITS
            }
            errors = {
                (bits, size): _number(entry["error"][f"{bits}-{size}"])
                for bits in BITS
                for size in GROUP_SIZES
                if f"{bits}-{size}" in entry["error"]
            }
            if not {(bits, usual_group(errors)) for bits in BITS} <= errors.keys():
                raise wrong
            found.costs[part], found.errors[part] = costs, errors
    except (OSError, ValueError, LookupError, TypeError, AttributeError, RecursionError):
        raise wrong from None
    return found


def _number(value: Any) -> float:
    if type(value) not in (int, float) or not 0 <= value < math.inf:
        raise ValueError("not a number")
    return float(value)
