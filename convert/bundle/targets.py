"""The consumers that a bundle can be made for, as values."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from ..errors import Problem
from ..file_names import CODEC, TOKENIZER, VOICES
from ..source.architecture import Architecture
from . import moshi_mlx, speech_swift
from .output_tensor import Output


@dataclass(frozen=True)
class Target:
    """What a consumer loads.

    programs: those that load it, beside this toolkit's own. recipe: the shipped one that is taken where none is named.
    dtype: its usual one for floats and scales. uniform: components that a uniform recipe quantizes. copies: source
    file -> its name in the bundle. voice_cache: dtype of a voice's tokens in ``voices/NAME.safetensors``, None where
    the archive is copied instead. indexed: whether model.safetensors.index.json belongs to it. mixes: whether any
    module may have any setting. problems: what of an architecture and a quantization it cannot load. without_voices:
    what it does with a bundle that has none. voiceless_programs: those that load such a bundle, empty for all.
    """

    name: str
    description: str
    programs: str
    recipe: str
    dtype: str
    uniform: tuple[str, ...]
    copies: dict[str, str]
    voice_cache: str | None
    indexed: bool
    mixes: bool
    layout: Callable[[Architecture], list[Output]]
    split: Callable[[Sequence[Output]], dict[str, list[Output]]]
    problems: Callable[[Architecture, Sequence[Output]], list[Problem]]
    config: Callable[[Architecture, Sequence[Output], str, list[str]], dict[str, Any]]
    without_voices: str
    voiceless_programs: str = ""

    def programs_of(self, with_voices: bool) -> str:
        """Return the programs that load a bundle which has voices, or none."""
        return self.programs if with_voices else self.voiceless_programs or self.programs

    def copies_of(self, with_voices: bool) -> dict[str, str]:
        """Return ``copies`` of a source that has an archive of voices, or none."""
        return {source: name for source, name in self.copies.items() if with_voices or source != VOICES}


def _anything(architecture: Architecture, outputs: Sequence[Output]) -> list[Problem]:
    del architecture, outputs
    return []


TARGETS = {
    target.name: target
    for target in (
        Target(
            name="speech-swift",
            description="the Swift/MLX library: one setting for temporal and depformer, the rest 16 bit",
            programs="speech-swift (Swift)",
            recipe="4bit",
            dtype="float16",
            uniform=("temporal", "depformer"),
            copies={CODEC: speech_swift.CODEC, TOKENIZER: TOKENIZER},
            voice_cache="F32",
            indexed=False,
            mixes=False,
            layout=speech_swift.layout,
            split=speech_swift.split,
            problems=speech_swift.problems,
            config=speech_swift.config,
            without_voices="the library then speaks in whatever voice the model samples",
        ),
        Target(
            name="moshi-mlx",
            description="moshi_mlx and personaplex-mlx: everything at 4 bit g32, 8 bit g64 or 16 bit",
            programs="moshi_mlx and personaplex-mlx (Python)",
            recipe="moshi-q4",
            dtype="bfloat16",
            uniform=("temporal", "depformer", "embeddings", "heads"),
            copies={CODEC: CODEC, TOKENIZER: TOKENIZER, VOICES: VOICES},
            voice_cache=None,
            indexed=False,
            mixes=False,
            layout=moshi_mlx.layout,
            split=moshi_mlx.runtime_split,
            problems=moshi_mlx.runtime_problems,
            config=moshi_mlx.runtime_config,
            without_voices="moshi_mlx needs none, personaplex-mlx does",
            voiceless_programs="moshi_mlx (Python)",
        ),
        Target(
            name="mlx",
            description="the mlx-lm convention: any setting for any module",
            programs="Python code that follows mlx-lm's conventions",
            recipe="4bit",
            dtype="bfloat16",
            uniform=("temporal", "depformer"),
            copies={CODEC: CODEC, TOKENIZER: TOKENIZER},
            voice_cache="I32",
            indexed=True,
            mixes=True,
            layout=moshi_mlx.layout,
            split=moshi_mlx.sharded_split,
            problems=_anything,
            config=moshi_mlx.sharded_config,
            without_voices="ppx-speak needs none",
        ),
    )
}
DEFAULT = "speech-swift"
