"""The plan of a conversion: what becomes of every source tensor, in which file, in how many bytes.

A pure value, made from an inventory of the source, a recipe and its target; nothing is read or written for it.
"""

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from ..errors import Problem, UserError, refuse
from ..file_names import CODEC, CONFIG, INDEX, TOKENIZER, VOICES, WEIGHTS
from ..hints import Hint
from ..parallel import AHEAD
from ..source import demo
from ..source.architecture import Architecture
from ..source.tensors import roles
from ..source.voices import PRESETS
from ..tensorfile import HashingFile, Spec, header_of
from .output_tensor import Output
from .recipe import DTYPES, Recipe
from .targets import TARGETS, Target

METADATA = {"format": "mlx"}
BLOCK_WEIGHTS = 1 << 21  # weights that one thread quantizes at a time
_MANIFEST_BYTES = 1 << 20


@dataclass(frozen=True)
class Inventory:
    """What a plan needs to know of a source.

    identity: its Hub id or folder name. sizes: bytes of its files, under the names that PersonaPlex's have, those of
    shards together; what it lacks is left out. voices: name -> (frames, token slots).
    others: members of its archive of voices that are no voices. filled: tensors copied from other depformer steps.
    archive: the archive of voices with those in it that were made from recordings; empty where there are none.
    """

    identity: str
    architecture: Architecture
    sizes: dict[str, int]
    voices: dict[str, tuple[int, int]]
    others: tuple[str, ...] = ()
    copied_steps: tuple[tuple[str, str], ...] = ()
    archive: bytes = b""


@dataclass(frozen=True)
class PlannedFile:
    """One file of the bundle: tensors, a voice, a copy of a source file, text or bytes. Exactly one of them is set."""

    name: str
    nbytes: int
    outputs: tuple[Output, ...] = ()
    voice: str = ""
    copy: str = ""
    text: str = ""
    data: bytes = b""


@dataclass(frozen=True)
class Plan:
    """What a conversion will do. dropped: what of the source does not get into the bundle, with the reason."""

    inventory: Inventory
    recipe: Recipe
    target: Target
    files: tuple[PlannedFile, ...]
    dropped: dict[str, str]

    @property
    def outputs(self) -> list[Output]:
        """Every output tensor of the model, in the order in which it is written."""
        return [output for file in self.files for output in file.outputs]

    @property
    def nbytes(self) -> int:
        """Bytes of all files but the manifest."""
        return sum(file.nbytes for file in self.files)

    @property
    def parameters(self) -> int:
        """Parameters of the source's model."""
        return sum(Spec(r.name, "BF16", r.shape).parameters for r in roles(self.inventory.architecture).values())

    @property
    def bits_per_weight(self) -> float:
        """Bits of the model's output tensors for each of its parameters."""
        return 8 * sum(output.nbytes for output in self.outputs) / self.parameters

    @property
    def free_disk(self) -> int:
        """Bytes that the output's disk must have free."""
        return self.nbytes + _MANIFEST_BYTES

    def peak_memory(self, workers: int) -> int:
        """Return about how many bytes a conversion holds at most, above Python and its imports.

        Blocks being made (input and output), blocks made and waiting, what waits for the disk, scales and biases of
        the largest tensor, voices, and what the compiled kernels take.
        """
        scales_and_biases = max((sum(spec.nbytes for spec in output.specs()[1:]) for output in self.outputs), default=0)
        voices = sum(frames * self.inventory.architecture.dim * 4 for frames, _ in self.inventory.voices.values())
        blocks = workers * BLOCK_WEIGHTS * 6 + AHEAD * workers * BLOCK_WEIGHTS * 2
        return blocks + HashingFile.QUEUED + scales_and_biases + voices + (64 << 20)


def make_plan(inventory: Inventory, recipe: Recipe) -> Plan:
    """Make the plan of a conversion.

    Raises UserError with all that the target cannot load, and all tensors that the recipe's groups do not divide.
    """
    target = TARGETS[recipe.target]
    dtype = DTYPES[recipe.dtype]
    inventory, unused = _trimmed(inventory, recipe.depformer_steps)
    outputs = [
        replace(output, dtype=dtype, quantization=recipe.quantization(output.role, output.step))
        for output in target.layout(inventory.architecture)
    ]
    of_target = target.problems(inventory.architecture, outputs)
    if unused:  # the recipe asks for fewer steps than the source has: filling them is no way out
        of_target = [replace(p, hint="") if p.hint is Hint.FILL_DEPFORMER_STEPS else p for p in of_target]
    refuse(of_target + _problems(recipe, outputs))
    files = [_tensors(name, group) for name, group in target.split(outputs).items()]
    if target.indexed:
        files.append(_index(files))
    dropped = unused | dict.fromkeys(inventory.others, "not a voice")
    if target.voice_cache:
        files += [_voice(name, inventory, dtype, target) for name in sorted(inventory.voices)]
    if target.voice_cache and VOICES in inventory.sizes:
        dropped[VOICES] = "its voices stand in voices/"
    copies = target.copies_of(VOICES in inventory.sizes or bool(inventory.archive))
    files += [_copy(source, name, inventory) for source, name in copies.items()]
    config = target.config(inventory.architecture, outputs, inventory.identity, sorted(inventory.voices))
    files.append(_text("config.json", config))
    plan = Plan(inventory, recipe, target, tuple(files), dropped)
    _check_total(plan)
    return plan


def _trimmed(inventory: Inventory, steps: int | None) -> tuple[Inventory, dict[str, str]]:
    """Return the inventory of a model with its first depformer steps only, and what is left out with the reason.

    Raises UserError if the agent's codebooks would not all be predicted, or there are not so many steps.
    """
    full = inventory.architecture
    if steps is None or steps == full.steps:
        return inventory, {}
    if not full.n_q // 2 <= steps < full.steps:
        raise UserError(
            f"depformer_steps is {steps}: the model has {full.steps}, and the first {full.n_q // 2} are the agent's: "
            f"give {full.n_q // 2}, or leave it out"
        )
    few = roles(replace(full, steps=steps))
    why = "predicts codebooks of the user, which are given"
    unused = {}
    for name, role in roles(full).items():
        if name not in few:
            unused[name] = why
        elif few[name].shape != role.shape:
            unused[f"{name} rows {few[name].shape[0]}-{role.shape[0] - 1}"] = why
    copied_steps = tuple(pair for pair in inventory.copied_steps if pair[0] in few)
    return replace(inventory, architecture=replace(full, steps=steps), copied_steps=copied_steps), unused


def _problems(recipe: Recipe, outputs: Sequence[Output]) -> list[Problem]:
    """Return rules that match nothing, and tensors whose rows their group size does not divide."""
    problems = []
    weights = [output for output in outputs if output.role.kind != "norm"]
    left = set(range(len(weights)))
    for rule in recipe.rules:
        matched = {place for place, output in enumerate(weights) if rule.matches(output.role, output.step)}
        if not matched & left:
            where = f" (line {rule.line})" if rule.line else ""
            why = "decides nothing, rules before it do" if matched else "matches no tensor of this model"
            problems.append(Problem(f"recipe {recipe.name}", f"a rule{where} {why}", "correct it"))
        left -= matched
    uneven = Counter(
        (output.role.component, output.role.module, output.shape[-1], output.quantization.group_size)
        for output in outputs
        if output.quantization and output.shape[-1] % output.quantization.group_size
    )
    for (component, module, columns, size), count in uneven.items():
        allowed = [str(smaller) for smaller in (64, 32) if columns % smaller == 0 and smaller < size]
        hint = f"use group size {' or '.join(allowed)}" if allowed else "keep them float"
        message = f"rows of {columns} weights are not divided by groups of {size} ({count} tensors)"
        problems.append(Problem(f"{component} {module}", message, hint))
    return problems


def _tensors(name: str, outputs: Sequence[Output]) -> PlannedFile:
    """Plan a file of tensors. An odd number of 2-byte values goes last, so that uint32 words stay aligned."""
    ordered = sorted(outputs, key=lambda output: output.nbytes % 4 != 0)
    header = header_of([spec for output in ordered for spec in output.specs()], METADATA)
    return PlannedFile(name, len(header) + sum(output.nbytes for output in ordered), tuple(ordered))


def voice_specs(inventory: Inventory, name: str, dtype: str, cache: str) -> list[Spec]:
    """Return the tensors of a voice's file."""
    frames, slots = inventory.voices[name]
    return [
        Spec("cache", cache, (1, 1 + inventory.architecture.n_q, slots)),
        Spec("embeddings", dtype, (frames, 1, 1, inventory.architecture.dim)),
    ]


def _voice(name: str, inventory: Inventory, dtype: str, target: Target) -> PlannedFile:
    specs = voice_specs(inventory, name, dtype, target.voice_cache or "")
    size = len(header_of(specs, METADATA)) + sum(spec.nbytes for spec in specs)
    return PlannedFile(f"voices/{name}.safetensors", size, voice=name)


def _copy(source: str, name: str, inventory: Inventory) -> PlannedFile:
    if source == VOICES and inventory.archive:
        return PlannedFile(name, len(inventory.archive), data=inventory.archive)
    return PlannedFile(name, inventory.sizes[source], copy=source)


def json_text(value: dict[str, Any]) -> str:
    """Return settings as the bundle's JSON files hold them."""
    return json.dumps(value, indent=2, ensure_ascii=False) + "\n"


def _text(name: str, value: dict[str, Any]) -> PlannedFile:
    text = json_text(value)
    return PlannedFile(name, len(text.encode()), text=text)


def _index(files: Sequence[PlannedFile]) -> PlannedFile:
    """Plan the index that says which file holds which tensor."""
    return _text(INDEX, index_of({output: file.name for file in files for output in file.outputs}))


def index_of(files: Mapping[Output, str]) -> dict[str, Any]:
    """Return the index of a sharded model: what mlx_lm reads to find the file of each tensor."""
    weights = {spec.name: file for output, file in files.items() for spec in output.specs()}
    total = sum(output.nbytes for output in files)
    return {"metadata": {"total_size": total}, "weight_map": dict(sorted(weights.items()))}


def _check_total(plan: Plan) -> None:
    """Make sure that every row of every source tensor is claimed, and no output name comes twice."""
    names = Counter((file.name, spec.name) for file in plan.files for o in file.outputs for spec in o.specs())
    wrong = [name for (_, name), count in names.items() if count > 1]
    claimed: dict[str, set[tuple[int, int]]] = {}
    for output in plan.outputs:
        claimed.setdefault(output.role.name, set()).add(output.rows)
    for name, role in roles(plan.inventory.architecture).items():
        rows = Spec(name, "BF16", role.shape).rows
        if sum(last - first for first, last in claimed.get(name, ())) != rows:
            wrong.append(name)
    if wrong:
        raise AssertionError(f"the target {plan.target.name} does not account for {', '.join(wrong[:5])}")


def inventory_of_7b(identity: str) -> Inventory:
    """Return what is known of PersonaPlex-7B before it is downloaded: its published layout and sizes."""
    sizes = {WEIGHTS: 16_742_870_000, CODEC: 384_644_900, TOKENIZER: 552_778, VOICES: 6_106_583, CONFIG: 64}
    return Inventory(identity, Architecture(), sizes, dict.fromkeys(PRESETS, (51, 4)))


def inventory_of_demo(size: str) -> Inventory:
    """Return what is known of a demo source before it is made: its architecture, and the sizes of its files."""
    architecture = demo.SIZES[size]
    voices = dict.fromkeys(PRESETS, (demo.voice_frames(architecture), demo.VOICE_SLOTS))
    return Inventory(size, architecture, demo.sizes_of(size), voices)
