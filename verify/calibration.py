"""What a model is quantized by: recorded conversations, or how every conversation begins."""

import hashlib
from pathlib import Path
from typing import Any

import numpy as np

from ..convert.plan import Plan
from ..convert.solution import Solution, Solver
from ..convert.source import TOKENIZER, Source
from .material import Material, from_system_prompt, prompt_tokens, read_tokens
from .refining import refine
from .solving import solve_model

# What conversations are about. The prompt that a verification reads is not among them.
PROMPTS = (
    "You enjoy having a good conversation. Have a casual discussion about weekend plans and the weather.",
    "You work for a city library and your name is Nora. A card is free; books may be kept for 21 days.",
    "You are a calm nurse on a night line. Ask about the symptoms and say when to see a doctor.",
    "You are an engineer on the radio. Explain to listeners how bridges carry their load, in plain words.",
    "You take orders for a small bakery. Bread is 4 dollars, cakes are 30, and Monday is closed.",
    "You are a travel guide who knows the mountains well and likes to tell old stories.",
)
ENOUGH = 4  # frames for each column of the widest matrix, from which on more help little


def material_for(source: Source, tokens: Path | None) -> Material:
    """Return recorded conversations, or, where none are given, all voices with several prompts."""
    a = source.architecture
    if tokens:
        return read_tokens(tokens, a, None, None)
    names = [voice.name for voice in source.voices]
    tokenizer = source.location.folder / TOKENIZER
    made = [
        from_system_prompt(a, source.voices, names, prompt_tokens(tokenizer, a, text), None, {"kind": "system prompts"})
        for text in PROMPTS
    ]
    frames = min(part.tokens.shape[2] for part in made)
    tokens_of, targets, counted = (
        np.concatenate([part[:, :, :frames] for part in parts])
        for parts in zip(*((part.tokens, part.targets, part.counted) for part in made), strict=True)
    )
    shape = {"sequences": len(names) * len(made), "frames": frames, "prompts": len(PROMPTS)}
    description = {"kind": "system prompts"} | shape
    return Material(description, tokens_of, targets, counted, tuple(names) * len(made), scored=False)


def solver_of(source: Source, plan: Plan, tokens: Path | None, steps: int = 0, quiet: bool = False) -> Solver:
    """Return what solves a plan's matrices, and refines them for so many steps.

    Raises UserError for tokens of another model.
    """
    material = material_for(source, tokens)

    def solve(solution: Solution) -> None:
        solve_model(source, plan.outputs, material, solution, quiet)
        if steps:
            refine(source, plan.outputs, material, solution, steps, quiet)

    return Solver(record(material) | {"refined_steps": steps}, solve)


def record(material: Material) -> dict[str, Any]:
    """Return what a manifest says of calibration material: its description, and a sha256 of its tokens."""
    digest = hashlib.sha256()
    for array in (material.tokens, material.targets, material.counted):
        digest.update(np.ascontiguousarray(array).tobytes())
    return material.description | {"sha256": digest.hexdigest()}


def is_scarce(material_record: dict[str, Any], source: Source) -> bool:
    """Tell whether there are too few frames for the widest matrix to be sure of its inputs."""
    return bool(material_record["sequences"] * material_record["frames"] < ENOUGH * source.architecture.hidden)
