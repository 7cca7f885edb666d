"""A plan or a finished conversion in a few lines, for people and programs."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from ..file_names import MANIFEST
from ..source.checkpoint import ZEROS
from ..tensorfile import Spec
from ..typed_json import Key
from .manifest import Manifest
from .output_tensor import Output
from .plan import Plan
from .ranges import format_ranges, ranges_of
from .run_memory import RunMemory, planned_memory
from .targets import TARGETS

_LISTED = 3  # names of what is dropped for one reason


@dataclass(frozen=True)
class OutputGroup:
    """Output tensors of a plan that are alike. action: ``4 bit g64 mse``, or the dtype that they keep."""

    file: str
    component: str
    module: str
    action: Annotated[str, Key("fate")]
    tensors: int
    parameters: int
    nbytes: Annotated[int, Key("bytes")]
    layers: tuple[int, ...] | None = None
    steps: tuple[int, ...] | None = None


@dataclass(frozen=True)
class PlanSummary:
    """What a dry run shows.

    files: bytes by name. peak_memory_bytes: of the conversion, above Python and its imports. run_memory: of a
    conversation with the bundle.
    """

    source: str
    target: str
    recipe: str
    dtype: str
    tensors: list[OutputGroup]
    copied_steps: Annotated[dict[str, str], Key("filled")]
    dropped: dict[str, str]
    files: dict[str, int]
    total_bytes: int
    parameters: int
    bits_per_weight: float
    peak_memory_bytes: int
    run_memory: RunMemory
    free_disk_bytes: int


def groups(plan: Plan) -> list[OutputGroup]:
    """Return what is done to every tensor, those alike taken together, in the order of the files."""
    alike: dict[tuple[str, str, str, str], list[Output]] = {}
    for file in plan.files:
        for output in file.outputs:
            action = output.quantization.label if output.quantization else f"kept, {plan.recipe.dtype}"
            alike.setdefault((file.name, output.role.component, output.role.module, action), []).append(output)
    return [
        OutputGroup(
            *names,
            tensors=len(outputs),
            parameters=sum(Spec(output.name, output.dtype, output.shape).parameters for output in outputs),
            nbytes=sum(output.nbytes for output in outputs),
            layers=_numbers(output.role.layer for output in outputs),
            steps=_numbers(output.step for output in outputs),
        )
        for names, outputs in alike.items()
    ]


def _numbers(numbers: Iterable[int | None]) -> tuple[int, ...] | None:
    """Return each number once, in order, None where there are none."""
    return tuple(dict.fromkeys(number for number in numbers if number is not None)) or None


def summary(plan: Plan, workers: int) -> PlanSummary:
    """Return what a dry run shows."""
    return PlanSummary(
        source=plan.inventory.identity,
        target=plan.target.name,
        recipe=plan.recipe.name,
        dtype=plan.recipe.dtype,
        tensors=groups(plan),
        copied_steps=dict(plan.inventory.copied_steps),
        dropped=plan.dropped,
        files={file.name: file.nbytes for file in plan.files},
        total_bytes=plan.nbytes,
        parameters=plan.parameters,
        bits_per_weight=round(plan.bits_per_weight, 4),
        peak_memory_bytes=plan.peak_memory(workers),
        run_memory=planned_memory(plan),
        free_disk_bytes=plan.free_disk,
    )


def text(plan: Plan, workers: int) -> str:
    """Return what a dry run prints."""
    about = summary(plan, workers)
    lines = [
        f"{about.source} -> {about.target}, recipe {about.recipe}, {about.dtype}",
        "",
        f"{'tensors':>7}  {'parameters':>12}  {'bytes':>9}  {'what':<32}  {'action':<16}  where",
    ]
    current = ""
    for group in about.tensors:
        if group.file != current:
            current = group.file
            lines.append(f"{current} ({size(about.files[current])})")
        ranges = (("layers", group.layers), ("steps", group.steps))
        where = "; ".join(f"{name} {format_ranges(ranges_of(numbers))}" for name, numbers in ranges if numbers)
        counts = f"{group.tensors:>7}  {group.parameters:>12,}  {size(group.nbytes):>9}"
        lines.append(f"{counts}  {f'{group.component} {group.module}':<32}  {group.action:<16}  {where}".rstrip())
    voices = [file for file in plan.files if file.voice]
    if not plan.inventory.voices:
        lines.append(f"no voices, as the source has none: {plan.target.without_voices}")
    if voices:
        lines.append(f"voices/ ({size(sum(file.nbytes for file in voices))}): {counted(len(voices), 'preset')}")
    lines += [
        f"{file.name} ({size(file.nbytes)}): {f'copy of {file.copy}' if file.copy else 'written from the plan'}"
        for file in plan.files
        if file.copy or file.text
    ]
    lines += [_copies(about.copied_steps)] if about.copied_steps else []
    reasons: dict[str, list[str]] = {}
    for name, reason in plan.dropped.items():
        reasons.setdefault(reason, []).append(name)
    for reason, names in reasons.items():
        more = f" and {len(names) - _LISTED} more" if len(names) > _LISTED else ""
        lines.append(f"{', '.join(names[:_LISTED])}{more}: dropped, {reason}")
    lines += [
        "",
        f"total {size(about.total_bytes)}, {about.bits_per_weight:.2f} bits per weight, "
        f"{about.parameters:,} parameters",
        f"needs about {size(about.peak_memory_bytes)} of memory above Python and its imports, "
        f"and {size(about.free_disk_bytes)} of free disk",
        f"a conversation takes about {size(about.run_memory.total)} of memory: weights "
        f"{size(about.run_memory.weights)}, KV cache of a whole context {size(about.run_memory.kv_cache)}, codec "
        f"{size(about.run_memory.codec)}",
    ]
    return "\n".join(lines)


def _copies(copied_steps: Mapping[str, str]) -> str:
    """Return how many tensors are copies of steps that the source has."""
    zeros = [name for name, origin in copied_steps.items() if origin == ZEROS]
    line = f"depformer steps 0-7 are copied to 8-15, in {len(copied_steps) - len(zeros)} tensors"
    return f"{line}; {', '.join(zeros)}, which has no counterpart, is filled with zeros" if zeros else line


def counted(number: int, noun: str) -> str:
    """Return a number of things, such as ``1 file`` or ``2 files``."""
    return f"{number} {noun}{'' if number == 1 else 's'}"


def size(nbytes: float) -> str:
    """Return bytes as people read them: three digits and a unit, powers of 1000."""
    for unit in ("B", "kB", "MB"):
        if nbytes < 999.5:
            return f"{nbytes:.3g} {unit}" if unit != "B" else f"{int(nbytes)} B"
        nbytes /= 1000
    return f"{nbytes:.2f} GB"


def count(parameters: int) -> str:
    """Return how many parameters a model has as people say it: three digits and a word, ``4.64 million``."""
    for word, unit in (("billion", 1e9), ("million", 1e6), ("thousand", 1e3)):
        value = parameters / unit
        if value >= 0.9995:
            return f"{value:.3g} {word}" if value < 999.5 else f"{value:,.0f} {word}"
    return str(parameters)


def finished(folder: Path, manifest: Manifest, written: int) -> str:
    """Return what is printed of a finished conversion; written: how many files this run wrote."""
    total = manifest.nbytes + (folder / MANIFEST).stat().st_size
    quantized = [tensor.relative_rmse for tensor in manifest.tensors if tensor.relative_rmse is not None]
    lines = [
        f"{folder}: {len(manifest.files) + 1} files, {size(total)}, "
        f"{manifest.bits_per_weight:.2f} bits per weight, for {manifest.target}"
    ]
    if quantized:
        middle = sorted(quantized)[len(quantized) // 2]
        lines.append(f"relative error of the weights: median {middle:.2%}, largest {max(quantized):.2%}")
    changed = [(manifest.overflowed, "too large"), (manifest.flushed, "too small, and became zero")]
    for number, what in changed:
        if number:
            lines.append(f"{number} value{' was' if number == 1 else 's were'} {what} in {manifest.dtype}")
    if adapter := manifest.source.adapter:
        lines.append(f"{adapter.id} was merged into {len(adapter.merged)} tensors")
    lines += [f"{_copies(steps)}; see {MANIFEST}"] if (steps := manifest.source.copied_steps) else []
    verb = "read back and checked" if written else "checked again"
    voices = f"{len(manifest.voices) or 'no'} voice{'' if len(manifest.voices) == 1 else 's'}"
    if not manifest.voices and (target := TARGETS.get(manifest.target)):
        lines.append(f"the source has no voices: {target.without_voices}")
    lines.append(f"every file was {verb}; {voices}; see manifest.json")
    return "\n".join(lines)
