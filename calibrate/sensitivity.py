"""How much a model's predictions diverge when one part of it is quantized and the rest is not; kept in a file."""

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..convert import typed_json
from ..convert.bundle.workspace import write_durably
from ..convert.errors import UserError, reason
from ..convert.regular_files import read_json
from ..convert.schema import Leaf, Maybe, OrNull, Schema, mismatch, number, whole
from ..convert.source.architecture import Architecture
from ..convert.source.tensors import COMPONENTS, Role, roles
from ..model.tokens import TokenDescription
from ..quant.affine import BITS, GROUP_SIZES, QuantizationConfig

STREAMS = ("text", "agent")
_VERSION = 1
_LARGEST = 1 << 24  # bytes of a file
_INDEX = OrNull(whole(0, 1 << 20))
_SETTINGS = [f"{bits}-{size}" for bits in BITS for size in GROUP_SIZES]
_PART: Schema = {
    "component": Leaf(f"one of {', '.join(COMPONENTS)}", lambda value: value in COMPONENTS),
    "modules": Leaf("text", lambda value: isinstance(value, str)),
    "layer": _INDEX,
    "step": _INDEX,
    "divergence": {str(bits): dict.fromkeys(STREAMS, number(0)) for bits in BITS},
    "error": dict.fromkeys(_SETTINGS, Maybe(number(0))),  # of group sizes that divide the rows
}
_FILE: Schema = {
    "sensitivities": Leaf(f"version {_VERSION}", lambda value: type(value) is int and value == _VERSION),
    "mark": Leaf("text", lambda value: isinstance(value, str)),
    "source": Maybe(Leaf("text", lambda value: isinstance(value, str))),  # not in files of earlier versions
    "material": typed_json.schema_of(TokenDescription),
    "parts": [_PART],
}


@dataclass(frozen=True, order=True)
class TensorGroup:
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
    """What was measured. costs: divergence of text and agent, in nats/token, by part and bits.

    errors: relative squared error of a part's weights, by part, bits and group size; the divergence is taken to grow
    with it. tokens: what was read. fingerprint: of the source and the tokens. source: fingerprint of the source alone,
    empty where a file of an earlier version does not say it.
    """

    tokens: TokenDescription
    fingerprint: str = ""
    source: str = ""
    costs: dict[TensorGroup, dict[int, dict[str, float]]] = field(default_factory=dict)
    errors: dict[TensorGroup, dict[tuple[int, int], float]] = field(default_factory=dict)

    @property
    def measured_on(self) -> str:
        """How much was read, in words."""
        used, available = self.tokens.sequences, self.tokens.available
        count = f"{used} of {available}" if available else f"{used}"
        return f"{count} sequence{'s' if (available or used) > 1 else ''} of {self.tokens.frames} frames"

    def to_json(self) -> dict[str, Any]:
        """Return it as its file holds it."""
        parts = [
            {
                "component": part.component,
                "modules": part.modules,
                "layer": part.layer,
                "step": part.step,
                "divergence": {str(bits): streams for bits, streams in costs.items()},
                "error": {f"{bits}-{size}": error for (bits, size), error in self.errors[part].items()},
            }
            for part, costs in self.costs.items()
        ]
        described = typed_json.to_json(self.tokens)
        source = {"source": self.source} if self.source else {}
        return {"sensitivities": _VERSION, "mark": self.fingerprint, **source, "material": described, "parts": parts}

    @classmethod
    def from_json(cls, data: Any) -> "Sensitivities":
        """Return the sensitivities in parsed JSON; raises ValueError with a sentence on what does not fit."""
        if problem := mismatch(data, _FILE):
            raise ValueError(problem)
        described = typed_json.from_json(TokenDescription, data["material"])
        made = cls(described, data["mark"], data.get("source") or "")
        for index, entry in enumerate(data["parts"]):
            part = TensorGroup(*(entry[key] for key in ("component", "modules", "layer", "step")))
            made.costs[part] = {
                bits: {stream: float(entry["divergence"][str(bits)][stream]) for stream in STREAMS} for bits in BITS
            }
            errors = {
                (bits, size): float(entry["error"][f"{bits}-{size}"])
                for bits in BITS
                for size in GROUP_SIZES
                if entry["error"].get(f"{bits}-{size}") is not None
            }
            if not errors or not {(bits, usual_group(errors)) for bits in BITS} <= errors.keys():
                raise ValueError(f"parts[{index}].error lacks some bits")
            made.errors[part] = errors
        return made

    def cost(self, part: TensorGroup, quantization: QuantizationConfig | None) -> dict[str, float] | None:
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


def group_of(role: Role, step: int | None) -> TensorGroup:
    """Return the part that an output of this role and depformer step belongs to."""
    within = role.module.partition(".")[0] + ".*" if "." in role.module else role.module
    if role.component == "embeddings":
        return TensorGroup("embeddings", role.module)
    return TensorGroup(role.component, within, role.layer if role.component == "temporal" else None, step)


def members_of(architecture: Architecture) -> dict[TensorGroup, list[tuple[str, int | None]]]:
    """Return the tensors, and rows of stacked ones, of each part that the agent's predictions depend on."""
    half, members = architecture.n_q // 2, dict[TensorGroup, list[tuple[str, int | None]]]()
    for name, role in roles(architecture).items():
        if role.kind == "norm":
            continue
        stacked = range(role.stacked) if role.stacked > 1 else [None]
        for index in stacked:
            step = role.step if index is None else index
            if step is None or step < half:
                members.setdefault(group_of(role, step), []).append((name, index))
    return members


def settings_of(columns: Iterable[int]) -> dict[tuple[int, int], float]:
    """Return an entry for each setting whose group size divides all columns."""
    widths = set(columns)
    sizes = [size for size in GROUP_SIZES if not any(width % size for width in widths)]
    return {(bits, size): 0.0 for bits in BITS for size in sizes}


def write(measured: Sensitivities, path: Path) -> None:
    """Write a file of sensitivities, whole or not at all."""
    write_durably(path, json.dumps(measured.to_json(), indent=1) + "\n")


def read(path: Path) -> Sensitivities:
    """Read a file of sensitivities; raises UserError for anything else."""
    try:
        return Sensitivities.from_json(read_json(path, _LARGEST))
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(
            f"{path}: not a file of sensitivities ({reason(error)}): give another, or remove it to measure again"
        ) from None
