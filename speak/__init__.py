"""A bundle in conversation: language model, sampling, codec, microphone. Never changes weights.

``load``, ``answer`` and ``talk`` do what ppx-speak does, ``measure`` what ppx-bench does, ``record_voice`` and
``write_voice`` what ppx-voice does. Names are imported when they
are first used.
"""

from typing import TYPE_CHECKING

from ..convert.lazy_exports import lazy_exports as _lazy_exports

if TYPE_CHECKING:
    from .answers import Answer as Answer
    from .answers import answer as answer
    from .answers import talk as talk
    from .benchmark import measure as measure
    from .recorded_voices import record_voice as record_voice
    from .recorded_voices import voices_for as voices_for
    from .recorded_voices import write_voice as write_voice
    from .sampling import Sampling as Sampling
    from .speaker import Speaker as Speaker
    from .speaker import SpeakOptions as SpeakOptions
    from .speaker import load as load

_MODULES = {
    "Answer": "answers",
    "answer": "answers",
    "talk": "answers",
    "measure": "benchmark",
    "record_voice": "recorded_voices",
    "voices_for": "recorded_voices",
    "write_voice": "recorded_voices",
    "Sampling": "sampling",
    "SpeakOptions": "speaker",
    "Speaker": "speaker",
    "load": "speaker",
}
__all__ = list(_MODULES)
__getattr__, __dir__ = _lazy_exports(__name__, _MODULES)
