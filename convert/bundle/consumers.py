"""Where the programs that load a bundle look for it, and the lines that run them with it.

speech-swift: ``HuggingFaceDownloader.getCacheDirectory`` and ``PersonaPlexModel.fromPretrained`` in its sources.
moshi_mlx 0.3.0 and personaplex-mlx: the options of their modules ``local``, ``local_web`` and ``run_inference``.
"""

import os
import re
import shlex
from dataclasses import dataclass, replace
from pathlib import Path

from ..file_names import CODEC, CONFIG, TOKENIZER, VOICES
from ..source.architecture import Architecture
from .manifest import Manifest
from .targets import TARGETS

SWIFT = "speech-swift"
PUBLISHED = ("aufklarer/PersonaPlex-7B-MLX-4bit", "aufklarer/PersonaPlex-7B-MLX-8bit")  # that its sources name
_VARIABLES = ("QWEN3_CACHE_DIR", "QWEN3_ASR_CACHE_DIR")
_MOSHI_STEPS = 8  # moshi_mlx takes the codebooks that its depformer does not predict from the user: with 16, none
_QUESTION = "question.wav"


@dataclass(frozen=True)
class Usage:
    """How a program is run with a bundle.

    line: a command, or Swift code; or None. note: what one must know.
    """

    program: str
    line: str | None
    note: str = ""


def swift_cache() -> Path:
    """Return the cache of speech-swift: in the folder that its environment variables name, or in the user's caches."""
    named = (os.environ.get(variable, "") for variable in _VARIABLES)
    root = next((Path(value) for value in named if value.strip()), Path.home() / "Library" / "Caches")
    return root.absolute() / "qwen3-speech"


def swift_folder(identity: str) -> Path:
    """Return where speech-swift looks for the model ``USER/NAME``, voices included."""
    return swift_cache().joinpath("models", *identity.split("/"))


def older_swift_folder(identity: str) -> Path:
    """Return where earlier releases kept it: if any weights are there, speech-swift still reads this folder."""
    key = re.sub(r"[^A-Za-z0-9._-]", "_", identity).strip("._")
    return swift_cache() / (key or "model")


def commands(folder: Path, manifest: Manifest, identity: str) -> list[Usage]:
    """Return the lines that run a bundle: as ``identity`` in speech-swift, with its files elsewhere."""
    bundle = folder.absolute()
    if manifest.target == SWIFT:
        code = f'try await PersonaPlexModel.fromPretrained(modelId: "{identity}", offlineMode: true)'
        line = shlex.join(["speech", "respond", "--model-id", identity, "--input", _QUESTION, "--output", "answer.wav"])
        note = (
            f"asks the Hub for {identity} first: it must be published there with these files, or the Hub out of reach"
        )
        if identity in PUBLISHED:
            note = f"online, it replaces these files by those that {identity} has on the Hub: use it offline"
        if not manifest.voices:
            note = f"{note}; no voices: {TARGETS[SWIFT].without_voices}"
        return [Usage("Swift", code), Usage("speech", line, note)]
    if manifest.target != "moshi-mlx":
        return [Usage("ppx-speak", shlex.join(["ppx-speak", str(bundle), _QUESTION, "--output", "answer.wav"]))]
    weights = next(name for name in manifest.files if name.startswith("model") and name.endswith(".safetensors"))
    quantized = [f"-q {bits}" for bits in ("4", "8") if f".q{bits}." in weights]
    files = {"--tokenizer": TOKENIZER, "--moshi-weight": weights, "--mimi-weight": CODEC}
    shared = [word for option, name in files.items() for word in (option, shlex.quote(str(bundle / name)))]
    config = ["--lm-config", shlex.quote(str(bundle / CONFIG))]
    unpack = f"tar -xzf {shlex.quote(str(bundle / VOICES))} && "
    spoken = ["--voice", "NATF2", "--voice-prompt-dir", "voices"]
    lines = [
        Usage(
            "personaplex-mlx",
            unpack + " ".join(["python -m personaplex_mlx.local", *quantized, *shared, *config, *spoken]),
            "the voices are unpacked into the folder voices, here",
        )
    ]
    if VOICES not in manifest.files:
        lines = [Usage("personaplex-mlx", None, "needs voices, and this bundle has none")]
    if manifest.architecture.steps != _MOSHI_STEPS:
        note = "takes no user's audio beside a depformer of more than 8 steps: convert with depformer_steps = 8 for it"
        return [*lines, Usage("moshi_mlx", None, note)]
    if manifest.architecture == replace(Architecture(), steps=_MOSHI_STEPS):
        lines.append(Usage("moshi_mlx", " ".join(["python -m moshi_mlx.local", *quantized, *shared]), "without voices"))
    web = ["python -m moshi_mlx.local_web", *quantized, *shared, *config]
    return [*lines, Usage("moshi_mlx", " ".join(web), "without voices, in a browser")]
