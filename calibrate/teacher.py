"""The original's predictions for a pool of sequences, computed once and read from a file while the model is fine-tuned.

So that the original's weights need no memory then. In the pool some tokens are sampled from the original's predictions,
as ``fine_tune`` does in each step; where the pool is larger than the calibration tokens, each of their sequences occurs
several times, with other tokens sampled.
"""

from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Self

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn.functional import log_softmax

from ..convert.bundle.quantized_store import MatrixKey
from ..convert.errors import UserError
from ..convert.source.architecture import Architecture
from ..convert.tensorfile import Spec, TensorFile, TensorWriter
from ..model.blocks import Block
from ..model.forward import Floats, Tokens
from ..model.reference import TorchModel, kept_by
from ..model.tokens import TokenSet, evenly_spaced
from ..model.walk import advance, each_block, step_inputs
from .gradients import sample_tokens
from .tuning import Batch, Predictions, with_sampled

POOL_BYTES = 4 << 30  # of predictions on the disk, at most: 44,000 frames of the 7B model
_VARIANTS = 4  # of each calibration sequence, at most
FILE = "teacher.safetensors"  # in a quantized-weight store
_FRAMES = 2048  # whose predictions are computed at a time


def pool_size(architecture: Architecture, sequences: int, frames: int, wanted: int) -> int:
    """Return of how many sequences there are predictions: as many as wanted, if they fit.

    sequences, frames: of the calibration tokens.
    """
    half = architecture.n_q // 2
    nbytes = 2 * frames * (architecture.text_card + half * architecture.card)
    return max(1, min(wanted, _VARIANTS * sequences, POOL_BYTES // nbytes))


@dataclass(frozen=True)
class TeacherPool:
    """Sequences, and an open file of the original's log-probabilities for them; a context manager.

    tokens, targets, counted: ``[sequences, streams, frames]``, as in ``TokenSet``. file: float16 tensors ``0`` for the
    text and from ``1`` on for the agent's codebooks, ``[sequences, frames, vocabulary]``.
    """

    tokens: Tokens
    targets: Tokens
    counted: NDArray[np.bool_]
    file: TensorFile

    def batch(self, chosen: NDArray[np.int64], device: str) -> tuple[Batch, Predictions]:
        """Return some sequences, and the log-probabilities for them in float32, on a device."""
        text, *audio = (self._read(name, chosen, device) for name in _names(self.file))
        batch = Batch(self.tokens[chosen], self.targets[chosen], torch.from_numpy(self.counted[chosen]).to(device))
        return batch, (text, torch.stack(audio, 2))

    def _read(self, name: str, chosen: NDArray[np.int64], device: str) -> Tensor:
        frames = self.tokens.shape[2]
        read = [self.file.read(name, index * frames, (index + 1) * frames) for index in chosen.tolist()]
        return torch.from_numpy(np.stack(read).reshape(len(chosen), frames, -1)).to(device).float()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.file.close()


def teacher_pool(
    original: TorchModel, token_set: TokenSet, count: int, folder: Path, progress: Callable[[int], object]
) -> TeacherPool:
    """Return a pool of so many sequences; its file is made in ``folder``, or anew where it is not one of this size.

    original: over weights on the disk; those of one block at a time are in memory. progress: called with 1 after each
    of ``pool_blocks``.
    """
    path = folder / FILE
    file = None
    with suppress(UserError):
        file = TensorFile(path)
    if file and file.specs["tokens"].shape[::2] != (count, token_set.tokens.shape[2]):
        file.close()
        file = None
    if file is None:
        _write(original, token_set, count, path, progress)
        file = TensorFile(path)
    shape = file.specs["tokens"].shape
    arrays = [file.read(name, 0, file.specs[name].rows).reshape(shape) for name in ("tokens", "targets", "counted")]
    return TeacherPool(arrays[0], arrays[1], arrays[2].astype(bool), file)


def pool_blocks(architecture: Architecture) -> int:
    """Return how many blocks are computed for a pool: all of both passes."""
    return 2 * 2 * (architecture.num_layers + architecture.depformer_num_layers)


def _write(
    original: TorchModel, token_set: TokenSet, count: int, path: Path, progress: Callable[[int], object]
) -> None:
    """Sample the tokens of a pool, and write it with the predictions for them, whole or not at all."""
    available = len(token_set.tokens)
    chosen = evenly_spaced(available, count) if count <= available else np.arange(count) % available
    some, random = token_set.chosen(chosen), np.random.default_rng(0)
    sampled = np.empty((count, 1 + original.architecture.n_q // 2, some.tokens.shape[2]), np.int32)
    generator = torch.Generator(original.device).manual_seed(0)
    for stream, rows, logits in _predictions(original, some.tokens, some.targets, progress):
        # Predictions that are not finite leave no sensible tokens to sample; training skips such a batch.
        sampled[rows, stream] = sample_tokens(torch.nan_to_num(logits), generator)
    tokens, targets = with_sampled(some, sampled, random)
    temporary = path.with_name(f"{path.name}.partial")
    known: dict[str, NDArray[Any]] = {"tokens": tokens, "targets": targets, "counted": some.counted.view(np.uint8)}
    a, frames = original.architecture, tokens.shape[2]
    cards = [a.text_card] + [a.card] * (a.n_q // 2)
    specs = [Spec(name, "U8" if name == "counted" else "I32", array.shape) for name, array in known.items()]
    specs += [Spec(str(stream), "F16", (count, frames, card)) for stream, card in enumerate(cards)]
    writer = TensorWriter(temporary, specs, {})
    try:
        for name, array in known.items():
            writer.append(name, array)
        for stream, _, logits in _predictions(original, tokens, targets, progress):
            writer.append(str(stream), log_softmax(logits, -1).half().cpu().numpy())
        writer.finish()
    finally:
        writer.close()
    temporary.replace(path)


def _predictions(
    original: TorchModel, tokens: Tokens, targets: Tokens, progress: Callable[[int], object]
) -> Iterator[tuple[int, slice, Tensor]]:
    """Yield a stream, sequences and logits ``[sequences, frames, vocabulary]``: the text's, then each codebook's."""
    kept: dict[MatrixKey, Tensor] = {}
    model = replace(original, weights=kept_by(kept, original.weights, original.device))
    count, _, frames = tokens.shape

    def through(component: str, x: Floats) -> Floats:
        def compute(block: Block, x: Floats) -> Floats:
            advance(model, block, x)
            kept.clear()
            progress(1)
            return x

        return each_block(model.architecture, component, x, compute)

    def head(name: str, x: Floats) -> Iterator[tuple[slice, Tensor]]:
        height = max(1, _FRAMES // frames)
        for first in range(0, count, height):
            rows = slice(first, first + height)
            yield rows, model.product(name, None, torch.from_numpy(x[rows]).to(model.device))
        kept.clear()

    with torch.no_grad():
        hidden = model.out_norm(through("temporal", model.embed(tokens)))
        for rows, logits in head("text_linear.weight", hidden):
            yield 0, rows, logits
        known = targets.transpose(0, 2, 1).reshape(count * frames, -1)
        steps = model.architecture.n_q // 2
        x = through("depformer", step_inputs(model, hidden.reshape(count * frames, -1), known, steps))
        for step in range(steps):
            for rows, logits in head(f"linears.{step}.weight", x[:, step].reshape(count, frames, -1)):
                yield step + 1, rows, logits


def _names(file: TensorFile) -> list[str]:
    return [name for name in file.specs if name.isdigit()]
