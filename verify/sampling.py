"""How a token is chosen from logits."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import mlx.core as mx

from ..convert.architecture import SAMPLING
from ..convert.problems import UserError


@dataclass(frozen=True)
class Sampling:
    """Temperatures, 0 for the likeliest token, and how many of the likeliest tokens are drawn from, 0 for all."""

    audio_temperature: float = SAMPLING["audio_temp"]
    audio_top_k: int = SAMPLING["audio_top_k"]
    text_temperature: float = SAMPLING["text_temp"]
    text_top_k: int = SAMPLING["text_top_k"]


_FIELDS = {  # of config.json -> ours, and the largest that makes sense
    "audio_temp": ("audio_temperature", 10.0),
    "audio_top_k": ("audio_top_k", 1 << 22),
    "text_temp": ("text_temperature", 10.0),
    "text_top_k": ("text_top_k", 1 << 22),
}
GREEDY = Sampling(0.0, 0, 0.0, 0)


def draw(logits: mx.array, temperature: float, top_k: int, key: mx.array) -> mx.array:
    """Return a token of ``logits [vocabulary]``, int32."""
    if not temperature:
        return logits.argmax(-1).astype(mx.int32)
    wide = logits.astype(mx.float32) / temperature
    if 0 < top_k < wide.shape[-1]:
        wide = mx.where(wide >= mx.topk(wide, top_k).min(), wide, -mx.inf)
    return mx.random.categorical(wide, key=key).astype(mx.int32)


def sampling_of(config: Mapping[str, Any]) -> Sampling:
    """Return the sampling that a config.json asks for, the usual one where it says nothing.

    Raises UserError for what is none.
    """
    held = config.get("sampling", {})
    found: dict[str, Any] = {}
    for key, (field, largest) in _FIELDS.items():
        value: Any = held.get(key, SAMPLING[key]) if isinstance(held, dict) else None
        kinds = (int,) if key.endswith("_k") else (int, float)
        if type(value) not in kinds or not 0 <= value <= largest:
            raise UserError(f"config.json: sampling: {key}: a number from 0 to {largest:g} is needed")
        found[field] = value
    return Sampling(**found)
