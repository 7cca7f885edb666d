"""What is damaged: a small source, bundles made from it, recipes, token files, recordings and an adapter."""

import shutil
import sys
import wave
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from safetensors.numpy import save_file
from server import Command, run

TESTS = Path(__file__).parent.parent
PICO = TESTS / "data" / "pico"
FILES = (
    "model.safetensors",
    "tokenizer-e351c8d8-checkpoint125.safetensors",
    "tokenizer_spm_32k_3.model",
    "voices.tgz",
    "config.json",
)
_BUNDLES = {
    "swift": ("--recipe", "4bit"),
    "moshi": ("--recipe", "moshi-q4"),
    "mlx": ("--bits", "4", "--group-size", "32", "--target", "mlx"),
}


@dataclass(frozen=True)
class Base:
    """Folders and files that cases copy from, and must never change."""

    source: Path
    bundles: tuple[Path, ...]
    recipes: tuple[Path, ...]
    tokens: Path
    recording: Path
    adapter: Path
    codec: Path | None = None


def make(folder: Path, cache: Path, codec: Path | None = None) -> Base:
    """Make everything below a folder; raises RuntimeError where one of the programs fails."""
    source = folder / "pico"
    source.mkdir()
    for name in FILES:
        shutil.copy(PICO / name, source / name)
    (source / "README.md").write_text("---\nlicense: cc-by-4.0\n---\n# pico\n")
    shutil.copy(PICO / "heldout_tokens.safetensors", folder / "tokens.safetensors")
    _recording(folder / "question.wav")
    (folder / "adapter").mkdir()
    _adapter(folder / "adapter")
    bundles = []
    for name, options in _BUNDLES.items():
        _do(Command("convert", ("pico", *options, "--no-verify", "-o", name)), folder, cache)
        asked = ("--reference", "pico", "--sequences", "2", "--frames", "48")
        if name == "swift":
            _do(Command("verify", (name, *asked)), folder, cache)
        bundles.append(folder / name)
    shipped = (*tuple(sorted((TESTS.parent / "recipes").glob("*.toml"))), TESTS / "data" / "uneven.toml")
    return Base(
        source,
        tuple(bundles),
        shipped,
        folder / "tokens.safetensors",
        folder / "question.wav",
        folder / "adapter",
        codec and codec.absolute(),
    )


def _do(command: Command, folder: Path, cache: Path) -> None:
    ending = run(command, folder, (cache,), 300)
    if ending.kind != "accepted":
        raise RuntimeError(f"{command}: {ending}")
    print(f"  made with {command.program} in {ending.seconds:.1f} s, {ending.memory >> 20} MiB", file=sys.stderr)


def _recording(path: Path) -> None:
    random = np.random.default_rng(0)
    with wave.open(str(path), "wb") as file:
        file.setparams((2, 2, 24000, 0, "NONE", ""))
        file.writeframes((random.standard_normal((12000, 2)) * 3000).astype("<i2").tobytes())


def _adapter(folder: Path) -> None:
    random = np.random.default_rng(0)
    held = {}
    for stem, rows, columns in (
        ("transformer.layers.0.self_attn.in_projs.0", 768, 256),
        ("transformer.layers.1.gating.linear_out", 256, 704),
        ("depformer.layers.0.self_attn.out_projs.3", 64, 64),
    ):
        held[f"{stem}.lora_A.weight"] = random.standard_normal((4, columns)).astype(np.float32)
        held[f"{stem}.lora_B.weight"] = random.standard_normal((rows, 4)).astype(np.float32)
    save_file(held, folder / "lora.safetensors")
    (folder / "config.json").write_text('{"lora_rank": 4, "lora_scaling": 2.0}')
