"""Sampling: temperature and top-k."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlx.core as mx

from ..convert.bundle.manifest import manifest_of
from ..convert.errors import UserError
from ..convert.file_names import CONFIG
from ..convert.source.architecture import SAMPLING, read_config

_MAX_TEMPERATURE = 10


@dataclass(frozen=True)
class Sampling:
    """Temperatures (0 for greedy decoding) and top-k (0 for the whole vocabulary)."""

    audio_temperature: float = SAMPLING["audio_temp"]
    audio_top_k: int = SAMPLING["audio_top_k"]
    text_temperature: float = SAMPLING["text_temp"]
    text_top_k: int = SAMPLING["text_top_k"]

    def __post_init__(self) -> None:
        """Raise UserError for values out of range."""
        for temperature in (self.audio_temperature, self.text_temperature):
            if type(temperature) not in (int, float) or not 0 <= temperature <= _MAX_TEMPERATURE:
                raise UserError(
                    f"a temperature is {str(temperature)[:40]}: a number from 0 to {_MAX_TEMPERATURE} is needed"
                )
        for top_k in (self.audio_top_k, self.text_top_k):
            if type(top_k) is not int or top_k < 0:
                raise UserError(f"a top-k is {str(top_k)[:40]}: a whole number is needed, 0 for all tokens")


GREEDY = Sampling(0.0, 0, 0.0, 0)


def draw(logits: mx.array, temperature: float, top_k: int, key: mx.array) -> mx.array:
    """Sample a token from ``logits [vocabulary]``, int32."""
    if not temperature:
        return logits.argmax(-1).astype(mx.int32)
    wide = logits.astype(mx.float32)
    wide = (wide - wide.max()) / temperature
    if 0 < top_k < wide.shape[-1]:
        wide = mx.where(wide >= mx.topk(wide, top_k).min(), wide, -mx.inf)
    return mx.random.categorical(wide, key=key).astype(mx.int32)


def sampling_in(bundle: Path) -> Sampling:
    """Return the sampling that a bundle asks for; raises UserError for what is not a bundle."""
    manifest_of(bundle)
    return sampling_of(read_config(bundle / CONFIG))


def sampling_of(config: Mapping[str, Any]) -> Sampling:
    """Return the sampling of a config.json, with defaults for missing keys.

    Raises UserError for values out of range.
    """
    given = config.get("sampling", {})
    if not isinstance(given, dict):
        raise UserError(f"config.json: sampling is {type(given).__name__}: a table of numbers is needed")
    values = SAMPLING | given
    try:
        return Sampling(values["audio_temp"], values["audio_top_k"], values["text_temp"], values["text_top_k"])
    except UserError as error:
        raise UserError([problem.within("config.json: sampling") for problem in error.problems]) from None
