"""The targets ``moshi-mlx`` and ``mlx``: parameter names of the Python runtimes, one depformer slice a step."""

from collections.abc import Sequence
from typing import Any

from ...quant.affine import QuantizationConfig
from ..errors import Problem
from ..file_names import CODEC, TOKENIZER
from ..hints import Hint
from ..source.architecture import Architecture, to_config
from ..source.tensors import Role, roles
from .output_tensor import Output, whole

RUNTIME_FORMS = {(4, 32): "model.q4.safetensors", (8, 64): "model.q8.safetensors", None: "model.safetensors"}
SHARD = 5 << 30  # bytes of tensors in one file at most, as mlx_lm shards


def layout(architecture: Architecture) -> list[Output]:
    """Return every output tensor, none quantized yet."""
    outputs: list[Output] = []
    for role in roles(architecture).values():
        if role.component == "depformer" and role.step is None:
            outputs += [_slice(role, step, architecture.steps) for step in range(architecture.steps)]
        else:
            outputs.append(whole(role, _name(role), role.shape[-1:] if role.kind == "norm" else None))
    return outputs


def _name(role: Role) -> str:
    if role.step is None:
        name = role.name.replace(".alpha", ".weight").replace(".in_proj_weight", ".in_proj.weight")
        return f"audio_{name.replace('emb', 'embs', 1)}" if role.module == "emb" else name
    module = {
        "depformer_in": "linear_in",
        "linears": "linear_out",
        "depformer_emb": "emb",
        "depformer_text_emb": "emb",
    }.get(role.module) or f"transformer.layers.{role.layer}.{role.module}"
    return f"depformer.slices.{role.step}.{module}.weight"


def _slice(role: Role, step: int, steps: int) -> Output:
    """Return one step's share of a depformer tensor: its rows of a stacked one, all of a norm that the steps share."""
    name = f"depformer.slices.{step}.transformer.layers.{role.layer}.{role.module}.weight"
    if role.kind == "norm":
        return Output(role, name, (0, 1), role.shape[-1:], step)
    rows = role.shape[0] // steps
    return Output(role, name, (step * rows, (step + 1) * rows), (rows, role.shape[1]), step)


def runtime_split(outputs: Sequence[Output]) -> dict[str, list[Output]]:
    """Return the one file that moshi_mlx looks for, named after its quantization."""
    return {
        RUNTIME_FORMS[_setting(next(output.quantization for output in outputs if output.role.kind != "norm"))]: [
            *outputs
        ]
    }


def _setting(quantization: QuantizationConfig | None) -> tuple[int, int] | None:
    return (quantization.bits, quantization.group_size) if quantization else None


def runtime_problems(architecture: Architecture, outputs: Sequence[Output]) -> list[Problem]:
    """Return what of a quantization or size moshi_mlx and personaplex-mlx cannot load."""
    settings = {_setting(output.quantization) for output in outputs if output.role.kind != "norm"}
    problems = []
    if len(settings) > 1 or not settings <= set(RUNTIME_FORMS):
        listed = ", ".join(sorted(f"{s[0]} bit group {s[1]}" if s else "16 bit" for s in settings))
        message = (
            "moshi-mlx loads every linear and embedding at 4 bit group 32, at 8 bit group 64, or nothing quantized: "
            f"not {listed}"
        )
        problems.append(Problem("", message, Hint.MOSHI_RECIPE))
    for what, hidden, expected in (
        ("temporal", architecture.hidden, 11 * architecture.dim // 4),
        ("depformer", architecture.depformer_hidden, 2 * architecture.depformer_dim_feedforward // 3),
    ):
        if hidden != expected:
            message = f"moshi-mlx expects the {what} MLP to be {expected} wide, here it is {hidden}"
            problems.append(Problem("", message, Hint.TARGET_MLX))
    return problems


def runtime_config(
    architecture: Architecture, outputs: Sequence[Output], base_model: str, voices: list[str]
) -> dict[str, Any]:
    """Return the full Moshi config that the runtimes need to build the model; they unpack voices.tgz themselves."""
    del voices
    return _config(architecture, base_model) | {"moshi_name": next(iter(runtime_split(outputs)))}


def _config(architecture: Architecture, base_model: str) -> dict[str, Any]:
    names = {"mimi_name": CODEC, "tokenizer_name": TOKENIZER}
    return {"model_type": "personaplex", "base_model": base_model, **names, **to_config(architecture)}


def sharded_split(outputs: Sequence[Output]) -> dict[str, list[Output]]:
    """Return files of at most SHARD bytes, named as mlx_lm names them."""
    shards: list[list[Output]] = [[]]
    size = 0
    for output in outputs:
        if size and size + output.nbytes > SHARD:
            shards.append([])
            size = 0
        shards[-1].append(output)
        size += output.nbytes
    if len(shards) == 1:
        return {"model.safetensors": shards[0]}
    return {f"model-{number:05}-of-{len(shards):05}.safetensors": shard for number, shard in enumerate(shards, 1)}


def sharded_config(
    architecture: Architecture, outputs: Sequence[Output], base_model: str, voices: list[str]
) -> dict[str, Any]:
    """Return a Moshi config with mlx_lm's ``quantization``: the commonest setting, and every module that differs."""
    weights = [output for output in outputs if output.role.kind != "norm"]
    settings = [_setting(output.quantization) for output in weights]
    quantized = [setting for setting in settings if setting]
    config = _config(architecture, base_model) | {"voices": voices}
    if not quantized:
        return config
    common = max(sorted(set(quantized)), key=quantized.count)
    quantization: dict[str, Any] = {"group_size": common[1], "bits": common[0], "mode": "affine"}
    for output, setting in zip(weights, settings, strict=True):
        if setting is None:
            quantization[output.path] = False
        elif setting != common:
            quantization[output.path] = {"group_size": setting[1], "bits": setting[0], "mode": "affine"}
    return config | {"quantization": quantization, "quantization_config": quantization}
