"""A plan or a finished conversion in a few lines: what people and programs read of it."""

from pathlib import Path
from typing import Any

from ..file_names import MANIFEST
from ..tensorfile import Spec
from .manifest import Manifest
from .plan import Plan
from .ranges import format_ranges, ranges_of

_LISTED = 3  # names of what is dropped for one reason


def groups(plan: Plan) -> list[dict[str, Any]]:
    """Return the fate of every tensor, those alike taken together, in the order of the files.

    Each: file, component, module, fate (``4 bit g64 lsq``, or the dtype that it keeps), tensors, parameters, bytes.
    """
    found: dict[tuple[str, str, str, str], dict[str, Any]] = {}
    for file in plan.files:
        for output in file.outputs:
            fate = output.quantization.label if output.quantization else f"kept, {plan.recipe.dtype}"
            key = (file.name, output.role.component, output.role.module, fate)
            names = ("file", "component", "module", "fate")
            entry = found.setdefault(
                key, {**dict(zip(names, key, strict=True)), "tensors": 0, "parameters": 0, "bytes": 0}
            )
            entry["tensors"] += 1
            for place, number in (("layers", output.role.layer), ("steps", output.step)):
                if number is not None and number not in entry.setdefault(place, []):
                    entry[place].append(number)
            entry["parameters"] += Spec(output.name, output.dtype, output.shape).parameters
            entry["bytes"] += output.nbytes
    return list(found.values())


def summary(plan: Plan, workers: int) -> dict[str, Any]:
    """Return what a dry run says, as JSON-ready values."""
    return {
        "source": plan.inventory.identity,
        "target": plan.target.name,
        "recipe": plan.recipe.name,
        "dtype": plan.recipe.dtype,
        "tensors": groups(plan),
        "filled": dict(plan.inventory.copied_steps),
        "dropped": plan.dropped,
        "files": {file.name: file.nbytes for file in plan.files},
        "total_bytes": plan.nbytes,
        "parameters": plan.parameters,
        "bits_per_weight": round(plan.bits_per_weight, 4),
        "peak_memory_bytes": plan.peak_memory(workers),
        "free_disk_bytes": plan.free_disk,
    }


def text(plan: Plan, workers: int) -> str:
    """Return what a dry run prints."""
    said = summary(plan, workers)
    lines = [
        f"{said['source']} -> {said['target']}, recipe {said['recipe']}, {said['dtype']}",
        "",
        f"{'tensors':>7}  {'parameters':>12}  {'bytes':>9}  {'what':<32}  {'fate':<16}  where",
    ]
    current = ""
    for entry in said["tensors"]:
        if entry["file"] != current:
            current = entry["file"]
            lines.append(f"{current} ({size(said['files'][current])})")
        what = f"{entry['component']} {entry['module']}"
        places = [place for place in ("layers", "steps") if place in entry]
        where = "; ".join(f"{place} {format_ranges(ranges_of(entry[place]))}" for place in places)
        counts = f"{entry['tensors']:>7}  {entry['parameters']:>12,}  {size(entry['bytes']):>9}"
        lines.append(f"{counts}  {what:<32}  {entry['fate']:<16}  {where}".rstrip())
    voices = [file for file in plan.files if file.voice]
    if voices:
        lines.append(f"voices/ ({size(sum(file.nbytes for file in voices))}): {len(voices)} presets")
    lines += [
        f"{file.name} ({size(file.nbytes)}): {f'copy of {file.copy}' if file.copy else 'written from the plan'}"
        for file in plan.files
        if file.copy or file.text
    ]
    lines += [f"{name}: filled from {origin}" for name, origin in plan.inventory.copied_steps]
    reasons: dict[str, list[str]] = {}
    for name, reason in plan.dropped.items():
        reasons.setdefault(reason, []).append(name)
    for reason, names in reasons.items():
        more = f" and {len(names) - _LISTED} more" if len(names) > _LISTED else ""
        lines.append(f"{', '.join(names[:_LISTED])}{more}: dropped, {reason}")
    lines += [
        "",
        f"total {size(said['total_bytes'])}, {said['bits_per_weight']:.2f} bits a weight "
        f"({said['parameters']:,} parameters)",
        f"needs about {size(said['peak_memory_bytes'])} of memory above Python and its imports, "
        f"and {size(said['free_disk_bytes'])} of free disk",
    ]
    return "\n".join(lines)


def size(nbytes: float) -> str:
    """Return bytes as people read them: three digits and a unit, powers of 1000."""
    for unit in ("B", "kB", "MB"):
        if nbytes < 999.5:
            return f"{nbytes:.3g} {unit}" if unit != "B" else f"{int(nbytes)} B"
        nbytes /= 1000
    return f"{nbytes:.2f} GB"


def finished(folder: Path, manifest: Manifest, written: int) -> str:
    """Return what is printed of a finished conversion; written: how many files this run wrote."""
    total = manifest.nbytes + (folder / MANIFEST).stat().st_size
    quantized = [tensor.relative_rmse for tensor in manifest.tensors if tensor.relative_rmse is not None]
    lines = [
        f"{folder}: {len(manifest.files) + 1} files, {size(total)}, "
        f"{manifest.bits_per_weight:.2f} bits a weight, for {manifest.target}"
    ]
    if quantized:
        middle = sorted(quantized)[len(quantized) // 2]
        lines.append(f"relative error of the weights: median {middle:.2%}, largest {max(quantized):.2%}")
    changed = [(manifest.overflowed, "too large"), (manifest.flushed, "too small, and became zero")]
    lines += [f"{count} values were {what} in {manifest.dtype}" for count, what in changed if count]
    if adapter := manifest.source.adapter:
        lines.append(f"{adapter.id} was merged into {len(adapter.merged)} tensors")
    lines += [f"{name}: filled from {origin}" for name, origin in manifest.source.copied_steps.items()]
    verb = "read back and checked" if written else "checked again"
    lines.append(f"every file was {verb}; {len(manifest.voices)} voices; see manifest.json")
    return "\n".join(lines)
