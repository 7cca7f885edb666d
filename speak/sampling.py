"""How a token is chosen from logits."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import mlx.core as mx

from ..convert.errors import UserError
from ..convert.source.architecture import SAMPLING

_HOTTEST = 10


@dataclass(frozen=True)
class Sampling:
    """Temperatures, 0 for the likeliest token, and how many of the likeliest tokens are drawn from, 0 for all."""

    audio_temperature: float = SAMPLING["audio_temp"]
    audio_top_k: int = SAMPLING["audio_top_k"]
    text_temperature: float = SAMPLING["text_temp"]
    text_top_k: int = SAMPLING["text_top_k"]

    def __post_init__(self) -> None:
        """Raise UserError for what is neither."""
        for temperature in (self.audio_temperature, self.text_temperature):
            if type(temperature) not in (int, float) or not 0 <= temperature <= _HOTTEST:
                raise UserError(f"a temperature is {str(temperature)[:40]}: a number from 0 to {_HOTTEST} is needed")
        for top_k in (self.audio_top_k, self.text_top_k):
            if type(top_k) is not int or top_k < 0:
                raise UserError(f"a top-k is {str(top_k)[:40]}: a whole number is needed, 0 for all tokens")


GREEDY = Sampling(0.0, 0, 0.0, 0)


def draw(logits: mx.array, temperature: float, top_k: int, key: mx.array) -> mx.array:
    """Return a token of ``logits [vocabulary]``, int32."""
    if not temperature:
        return logits.argmax(-1).astype(mx.int32)
    wide = logits.astype(mx.float32)
    wide = (wide - wide.max()) / temperature
    if 0 < top_k < wide.shape[-1]:
        wide = mx.where(wide >= mx.topk(wide, top_k).min(), wide, -mx.inf)
    return mx.random.categorical(wide, key=key).astype(mx.int32)


def sampling_of(config: Mapping[str, Any]) -> Sampling:
    """Return the sampling that a config.json asks for, the usual one where it says nothing.

    Raises UserError for what is none.
    """
    held = config.get("sampling", {})
    if not isinstance(held, dict):
        raise UserError(f"config.json: sampling is {type(held).__name__}: numbers by name are needed")
    asked = SAMPLING | held
    try:
        return Sampling(asked["audio_temp"], asked["audio_top_k"], asked["text_temp"], asked["text_top_k"])
    except UserError as error:
        raise UserError([f"config.json: sampling: {problem}" for problem in error.problems]) from None
