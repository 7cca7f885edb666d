"""The target ``speech-swift``: the Swift/MLX library.

Its loader knows one quantization setting for the temporal transformer, shared by the depformer or not used there, and
silently skips what it does not find. Names are the checkpoint's own, split into three files.
"""

from collections.abc import Sequence
from typing import Any

from ..errors import Problem
from ..hints import Hint
from ..source.architecture import SAMPLING, Architecture
from ..source.tensors import Role, roles
from .output_tensor import Output, whole

FILES = {"temporal": "temporal.safetensors", "depformer": "depformer.safetensors"}
EMBEDDINGS = "embeddings.safetensors"
CODEC = "mimi.safetensors"


def layout(architecture: Architecture) -> list[Output]:
    """Return every output tensor, none quantized yet."""
    return [whole(role, _name(role)) for role in roles(architecture).values()]


def _name(role: Role) -> str:
    name = role.name.removeprefix("transformer.") if role.component == "temporal" else role.name
    return name.removeprefix("depformer.") if role.component == "depformer" else name


def split(outputs: Sequence[Output]) -> dict[str, list[Output]]:
    """Return the outputs of each file."""
    files: dict[str, list[Output]] = {name: [] for name in (*FILES.values(), EMBEDDINGS)}
    for output in outputs:
        files[FILES.get(output.role.component, EMBEDDINGS)].append(output)
    return files


def problems(architecture: Architecture, outputs: Sequence[Output]) -> list[Problem]:
    """Return what of a quantization the Swift loader cannot load."""
    messages, too_few = [], []
    if architecture.steps < architecture.n_q:
        message = (
            f"speech-swift loads a depformer of {architecture.n_q} steps, not {architecture.steps}: "
            "the targets moshi-mlx and mlx load fewer"
        )
        too_few = [Problem("", message, Hint.FILL_DEPFORMER_STEPS)]
    linears = [output for output in outputs if output.role.kind == "linear"]
    settings = sorted({(o.quantization.bits, o.quantization.group_size) for o in outputs if o.quantization})
    if len(settings) > 1:
        listed = ", ".join(f"{bits} bit group {size}" for bits, size in settings)
        messages.append(f"speech-swift loads one setting for all quantized layers, not {listed}: choose one of them")
    for component in ("embeddings", "heads"):
        if any(output.quantization for output in outputs if output.role.component == component):
            messages.append(
                f"speech-swift loads {component} as floats: keep them (quantize temporal and depformer only)"
            )
    quantized = {}
    for component in FILES:
        quantizations = [output.quantization is not None for output in linears if output.role.component == component]
        quantized[component] = any(quantizations)
        if any(quantizations) and not all(quantizations):
            messages.append(
                f"speech-swift loads all linear layers of the {component} quantized or none: "
                f"the recipe quantizes {sum(quantizations)} of {len(quantizations)}; the target mlx can mix"
            )
    if quantized["depformer"] and not quantized["temporal"]:
        messages.append("speech-swift loads a quantized depformer only beside a quantized temporal: quantize both")
    return too_few + [Problem("", message) for message in messages]


def config(architecture: Architecture, outputs: Sequence[Output], base_model: str, voices: list[str]) -> dict[str, Any]:
    """Return config.json as the Swift library reads it."""
    a = architecture
    quantizations = {output.role.component: output.quantization for output in outputs if output.quantization}
    quantization = next(iter(quantizations.values()), None)
    return {
        "model_type": "personaplex",
        "version": "1.0",
        "base_model": base_model,
        "temporal": {
            "dim": a.dim,
            "num_layers": a.num_layers,
            "num_heads": a.num_heads,
            "hidden_scale": a.hidden_scale,
            "n_q": a.n_q // 2,
            "card": a.card,
            "text_card": a.text_card,
            "context": a.context,
            "max_period": a.max_period,
        },
        "depformer": {
            "dim": a.depformer_dim,
            "num_layers": a.depformer_num_layers,
            "num_heads": a.depformer_num_heads,
            "dim_feedforward": a.depformer_hidden,
            "num_steps": a.steps,
            "card": a.card,
            "text_card": a.text_card,
            "context": a.steps,
            "weights_per_step": True,
            "multi_linear": True,
        },
        "mimi": {
            "sample_rate": 24000,
            "frame_rate": 12.5,
            "num_codebooks": a.n_q,
            "dimension": 512,
            "codebook_size": a.card,
            "codebook_dim": 256,
        },
        "sampling": dict(SAMPLING),
        "delays": list(a.delays),
        "quantization": {
            "bits": quantization.bits if quantization else 16,
            "group_size": quantization.group_size if quantization else 64,
            "quantized_components": [name for name in FILES if name in quantizations],
        },
        "voices": voices,
    }
