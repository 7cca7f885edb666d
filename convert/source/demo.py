"""Demo sources: seeded, made offline, with every file and all 475 tensors of the real one.

``demo`` is narrow and ready in a second; ``demo:audio`` is as narrow, and has a whole codec, so that it can be spoken
with; ``demo:7b`` has the real shapes. Weights are no trained ones: they have the
spread between rows and the few outliers that trained ones have, which is what quantizers and benchmarks feel.
"""

import gzip
import io
import json
import math
import shutil
import tarfile
import tempfile
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from ...quant.affine import BFLOAT16
from ..cache_folder import cache_folder
from ..parallel import cores, in_order
from ..progress import byte_bar
from ..tensorfile import Spec, TensorWriter, header_of
from . import mimi
from .architecture import Architecture, to_config
from .tensors import Role, roles
from .voices import PRESETS

VERSION = 3  # of the recipe below: a cached demo of another version is made again
SEED = 7
_NARROW = Architecture(
    dim=256,
    num_heads=4,
    context=250,
    text_card=512,
    card=128,
    depformer_dim=64,
    depformer_num_heads=1,
    depformer_dim_feedforward=288,
)
SIZES = {"demo": _NARROW, "demo:audio": replace(_NARROW, card=2048), "demo:7b": Architecture()}
FULL_SIZE = "demo:7b"
LARGE = ("demo:audio", FULL_SIZE)  # those with a whole codec: 385 MB of it
VOICE_SLOTS = 4  # of the ring of tokens that a voice ends with
_BLOCK = 1 << 22  # weights made at a time; part of what the seed means


def folder_of(size: str) -> Path:
    """Return where a demo source is kept: in the user's cache."""
    return cache_folder() / f"{size.replace(':', '-')}-{VERSION}"


def cached(size: str, quiet: bool = False) -> Path:
    """Return the folder of a demo source; makes it if it is not there."""
    folder = folder_of(size)
    if not folder.is_dir():
        make(size, folder, quiet)
    return folder


def make(size: str, folder: Path, quiet: bool = False, architecture: Architecture | None = None) -> None:
    """Write a demo source into a new folder, which appears when it is whole.

    Another architecture than the size's own gives a source of that architecture.
    """
    a = architecture or SIZES[size]
    folder.parent.mkdir(parents=True, exist_ok=True)
    partial = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
    try:
        (partial / "config.json").write_text(_config(a))
        (partial / "tokenizer_spm_32k_3.model").write_bytes(tokenizer(a.text_card))
        (partial / "voices.tgz").write_bytes(_voices(a))
        codec(partial / "tokenizer-e351c8d8-checkpoint125.safetensors", size in LARGE)
        _weights(partial / "model.safetensors", a, quiet)
        partial.chmod(0o755)
        partial.rename(folder)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise


def sizes_of(size: str) -> dict[str, int]:
    """Return the bytes of a demo's files by name, as ``make`` writes them; only the small ones are made for it."""
    a = SIZES[size]
    tensors = {
        "model.safetensors": [Spec(role.name, "BF16", role.shape) for role in _held(a)],
        "tokenizer-e351c8d8-checkpoint125.safetensors": _codec_specs(size in LARGE),
    }
    sizes = {name: len(header_of(specs, {})) + sum(spec.nbytes for spec in specs) for name, specs in tensors.items()}
    small = {"tokenizer_spm_32k_3.model": tokenizer(a.text_card), "voices.tgz": _voices(a)}
    return sizes | {name: len(data) for name, data in small.items()} | {"config.json": len(_config(a))}


def _config(architecture: Architecture) -> str:
    config = {"model_type": "personaplex"} | ({} if architecture == Architecture() else to_config(architecture))
    return json.dumps(config, indent=2) + "\n"


def _held(architecture: Architecture) -> list[Role]:
    return sorted(roles(architecture).values(), key=lambda role: role.name)


def _weights(path: Path, architecture: Architecture, quiet: bool) -> None:
    held = _held(architecture)
    specs = [Spec(role.name, "BF16", role.shape) for role in held]

    def blocks() -> Iterator[tuple[int, Role, int, int, int]]:
        for index, (role, spec) in enumerate(zip(held, specs, strict=True)):
            rows = max(1, _BLOCK // spec.columns)
            for first in range(0, spec.rows, rows):
                yield index, role, first, min(first + rows, spec.rows), spec.columns

    writer = TensorWriter(path, specs, {})
    total = sum(spec.nbytes for spec in specs)
    try:
        with byte_bar("making demo", total, quiet) as bar:
            for name, block in in_order(lambda item: (item[1].name, _block(architecture, *item)), blocks(), cores()):
                bar.update(writer.append(name, block))
        writer.finish()
    finally:
        writer.close()


def _block(
    architecture: Architecture, index: int, role: Role, first: int, last: int, columns: int
) -> NDArray[np.generic]:
    """Make rows of one tensor, from a stream of random numbers of their own.

    What a block adds is smaller the more blocks there are, as in GPT-2 before its training: errors then add up about
    as they do in trained models, where in a plain random one they grow from layer to layer.
    """
    random = np.random.Generator(np.random.SFC64([SEED, index, first]))
    values = random.standard_normal((last - first, columns), dtype=np.float32)
    if role.kind == "norm":
        return (1 + 0.1 * values).astype(BFLOAT16)
    row_scales = np.exp(0.25 * random.standard_normal((last - first, 1), dtype=np.float32))
    scale = np.float32(0.3 if role.kind == "embedding" else columns**-0.5)
    if role.module in ("self_attn.out_proj", "gating.linear_out"):
        depth = architecture.num_layers if role.component == "temporal" else architecture.depformer_num_layers
        scale *= np.float32((2 * depth) ** -0.5)
    values *= row_scales * scale
    count = values.size // 8192
    values.reshape(-1)[random.integers(0, values.size, count)] *= 6
    return values.astype(BFLOAT16)


def codec(path: Path, whole: bool) -> None:
    """Write a codec's file: Mimi with random weights, which makes noise, or two small tensors in its place."""
    specs = _codec_specs(whole)
    writer = TensorWriter(path, specs, {})
    for number, spec in enumerate(specs):
        random = np.random.Generator(np.random.SFC64([SEED, 2000 + number]))
        if len(spec.shape) == 1 or spec.name.endswith("weight_g"):
            values = np.full(spec.shape, not spec.name.endswith("bias"), np.float32)
        else:
            values = random.standard_normal(spec.shape, dtype=np.float32)
            values = values * np.float32(math.prod(spec.shape[1:]) ** -0.5)
        writer.append(spec.name, values)
    writer.finish()


def _codec_specs(whole: bool) -> list[Spec]:
    few: dict[str, tuple[int, ...]] = {"encoder.model.0.conv.conv.weight": (64, 1, 7)}
    few |= {"quantizer.rvq_first.vq.layers.0._codebook.embedding_sum": (64, 256)}
    return [Spec(name, "F32", shape) for name, shape in (mimi.tensors() if whole else few).items()]


def voice_frames(architecture: Architecture) -> int:
    """Return how many frames a demo's voices have."""
    return min(51, architecture.context // 2)


def _voices(a: Architecture) -> bytes:
    """Return a voices.tgz with all presets: embeddings of the size that sums of the model's own have."""
    import torch

    frames = voice_frames(a)
    unpacked = io.BytesIO()
    with tarfile.open(fileobj=unpacked, mode="w") as archive:
        for number, name in enumerate(PRESETS):
            random = np.random.Generator(np.random.SFC64([SEED, 1000 + number]))
            embeddings = torch.from_numpy(random.standard_normal((frames, 1, 1, a.dim), dtype=np.float32))
            cache = torch.from_numpy(random.integers(0, a.card, (1, 1 + a.n_q, VOICE_SLOTS)))
            cache[:, 0] = a.text_padding
            voice = io.BytesIO()
            torch.save({"embeddings": embeddings.to(torch.bfloat16), "cache": cache}, voice)
            member = tarfile.TarInfo(f"voices/{name}.pt")
            member.size = voice.tell()
            archive.addfile(member, io.BytesIO(voice.getvalue()))
    return gzip.compress(unpacked.getvalue(), compresslevel=1, mtime=0)


def tokenizer(pieces: int) -> bytes:
    """Return a sentencepiece model (a serialized ModelProto) of so many pieces: letters, then placeholders.

    Good for a session with the demo, not for text: every character is a token of its own.
    """
    normal, unknown, control, byte = 1, 2, 3, 6
    vocabulary = [("<unk>", unknown), ("<s>", control), ("</s>", control), ("<pad>", control)]
    vocabulary += [(f"<0x{value:02X}>", byte) for value in range(256)]
    vocabulary += [("\u2581", normal)] + [(chr(code), normal) for code in range(33, 127)]
    vocabulary += [(f"<placeholder_{number}>", normal) for number in range(pieces - len(vocabulary))]
    model = bytearray()
    for rank, (piece, kind) in enumerate(vocabulary[:pieces]):
        text = piece.encode()
        score = np.float32(-rank).tobytes() if kind == normal else np.float32(0).tobytes()
        message = b"\x0a" + _varint(len(text)) + text + b"\x15" + score + b"\x18" + _varint(kind)
        model += b"\x0a" + _varint(len(message)) + message
    trainer = b"\x18\x01" + b"\x20" + _varint(pieces) + b"\x98\x02\x01"  # unigram, vocab_size, byte_fallback
    trainer += b"".join(bytes([0xC0 + 8 * i, 0x02]) + _varint(i) for i in range(3)) + b"\xd8\x02\x03"  # unk bos eos pad
    model += b"\x12" + _varint(len(trainer)) + trainer
    normalizer = b"\x0a\x08identity" + b"\x18\x01\x20\x01\x28\x01"
    model += b"\x1a" + _varint(len(normalizer)) + normalizer
    return bytes(model)


def _varint(value: int) -> bytes:
    encoded = bytearray()
    while value > 0x7F:
        encoded.append(0x80 | value & 0x7F)
        value >>= 7
    encoded.append(value)
    return bytes(encoded)
