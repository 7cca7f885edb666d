"""The original's predictions for pools of sequences, which fine-tuning in low memory reads from a file.

So that the original's weights need no memory then. In a pool some tokens are sampled from the original's predictions,
as ``fine_tune`` does in each step. Each of its sequences is read once; then the next pool takes its place. A model that
reads them again overfits them (docs/fidelity.md).
"""

import math
from collections.abc import Callable, Generator, Iterator, Sequence
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
from ..model.forward import Tokens
from ..model.reference import TorchModel
from ..model.tokens import TokenSet
from ..model.walk import each_block
from ..model.weights import kept_by
from .gradients import sample_tokens
from .tuning import Batch, Predictions, with_sampled

POOL_BYTES = 4 << 30  # of predictions on the disk, at most: 44,000 frames of the 7B model
FILE = "teacher.safetensors"  # in a quantized-weight store
_SEQUENCES = 1024  # of a pool, at most: what goes into their blocks is in memory
_FRAMES = 2048  # whose predictions are computed at a time


def pool_shape(architecture: Architecture, frames: int, height: int, steps: int) -> tuple[int, int]:
    """Return for how many steps each pool is, and how many sequences a step reads: as many as asked for, if they fit.

    Pools are as few as can be, all of one size. frames: of a sequence. height: sequences of a step. steps: of all.
    """
    half = architecture.n_q // 2
    nbytes = 2 * frames * (architecture.text_card + half * architecture.card)
    most = max(1, min(_SEQUENCES, POOL_BYTES // nbytes))
    height = min(height, most)
    pools = max(1, math.ceil(steps / (most // height)))
    return max(1, math.ceil(steps / pools)), height


def batches(
    original: TorchModel, token_set: TokenSet, folder: Path, height: int, steps: range, on_pool: Callable[[], object]
) -> Generator[tuple[Batch, Predictions], None, None]:
    """Yield for each step so many sequences, and the original's predictions for them; the same whatever step is first.

    steps: up to the last one of all. on_pool: called before a pool is made, which takes a while.
    """
    each, height = pool_shape(original.architecture, token_set.tokens.shape[2], height, steps.stop)
    first = steps.start
    while first < steps.stop:
        number = first // each
        last = (number + 1) * each
        with teacher_pool(original, token_set, each * height, number, folder, on_pool) as pool:
            for step in range(first, min(steps.stop, last)):
                begin = step % each * height
                yield pool.batch(range(begin, begin + height), original.device)
        first = last


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

    def batch(self, chosen: Sequence[int], device: str) -> tuple[Batch, Predictions]:
        """Return some sequences, and the log-probabilities for them in float32, on a device."""
        text, *audio = (self._read(name, chosen, device) for name in _names(self.file))
        batch = Batch(self.tokens[chosen], self.targets[chosen], torch.from_numpy(self.counted[chosen]).to(device))
        return batch, (text, torch.stack(audio, 2))

    def _read(self, name: str, chosen: Sequence[int], device: str) -> Tensor:
        frames = self.tokens.shape[2]
        read = [self.file.read(name, index * frames, (index + 1) * frames) for index in chosen]
        return torch.from_numpy(np.stack(read).reshape(len(chosen), frames, -1)).to(device).float()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.file.close()


def teacher_pool(
    original: TorchModel, token_set: TokenSet, count: int, number: int, folder: Path, on_pool: Callable[[], object]
) -> TeacherPool:
    """Return the pool of that number, of so many sequences; its file is made in ``folder`` if it is not there.

    original: over weights on the disk; those of one block at a time are in memory. on_pool: called before it is made.
    """
    path, mark = folder / FILE, {"pool": f"{number} of {count}"}
    file = None
    with suppress(UserError):
        file = TensorFile(path)
    if file and file.metadata != mark:
        file.close()
        file = None
    if file is None:
        on_pool()
        path.unlink(missing_ok=True)
        _write(original, token_set, count, number, path, mark)
        file = TensorFile(path)
    shape = file.specs["tokens"].shape
    arrays = [file.read(name, 0, file.specs[name].rows).reshape(shape) for name in ("tokens", "targets", "counted")]
    return TeacherPool(arrays[0], arrays[1], arrays[2].astype(bool), file)


def _write(
    original: TorchModel, token_set: TokenSet, count: int, number: int, path: Path, mark: dict[str, str]
) -> None:
    """Sample the tokens of a pool, and write it with the predictions for them, whole or not at all."""
    available, random = len(token_set.tokens), np.random.default_rng(number)
    some = token_set.chosen(
        np.concatenate([random.permutation(available) for _ in range(-(-count // available))])[:count]
    )
    sampled = np.empty((count, 1 + original.architecture.n_q // 2, some.tokens.shape[2]), np.int32)
    generator = torch.Generator(original.device).manual_seed(number)
    for stream, rows, logits in _predictions(original, some.tokens, some.targets):
        # Predictions that are not finite leave no sensible tokens to sample; training skips such a batch.
        sampled[rows, stream] = sample_tokens(torch.nan_to_num(logits), generator)
    tokens, targets = with_sampled(some, sampled, random)
    temporary = path.with_name(f"{path.name}.partial")
    known: dict[str, NDArray[Any]] = {"tokens": tokens, "targets": targets, "counted": some.counted.view(np.uint8)}
    a, frames = original.architecture, tokens.shape[2]
    cards = [a.text_card] + [a.card] * (a.n_q // 2)
    specs = [Spec(name, "U8" if name == "counted" else "I32", array.shape) for name, array in known.items()]
    specs += [Spec(str(stream), "F16", (count, frames, card)) for stream, card in enumerate(cards)]
    writer = TensorWriter(temporary, specs, mark)
    try:
        for name, array in known.items():
            writer.append(name, array)
        for stream, _, logits in _predictions(original, tokens, targets):
            writer.append(str(stream), log_softmax(logits, -1).half().cpu().numpy())
        writer.finish()
    finally:
        writer.close()
    temporary.replace(path)


def _predictions(original: TorchModel, tokens: Tokens, targets: Tokens) -> Iterator[tuple[int, slice, Tensor]]:
    """Yield a stream, sequences and logits ``[sequences, frames, vocabulary]``: the text's, then each codebook's.

    On the device: the weights of one block, and what goes into it for all sequences (at 7B and ``POOL_BYTES`` 2.2 GB),
    which takes a fraction of the time of moving it there and back for each block.
    """
    kept: dict[MatrixKey, Tensor] = {}
    model = replace(original, weights=kept_by(kept, original.weights, original.device))
    count, _, frames = tokens.shape

    def through(component: str, x: Tensor) -> Tensor:
        def compute(block: Block, x: Tensor) -> Tensor:
            model.advance(block, x)
            kept.clear()
            return x

        return each_block(model.architecture, component, x, compute)

    def head(name: str, x: Tensor) -> Iterator[tuple[slice, Tensor]]:
        height = max(1, _FRAMES // frames)
        for first in range(0, count, height):
            rows = slice(first, first + height)
            yield rows, model.product(name, None, x[rows])
        kept.clear()

    with torch.no_grad():
        hidden = model.hidden_states(through("temporal", model.embedded(tokens)))
        for rows, logits in head("text_linear.weight", hidden):
            yield 0, rows, logits
        known = targets.transpose(0, 2, 1).reshape(count * frames, -1)
        steps = model.architecture.n_q // 2
        x = through("depformer", model.step_inputs(hidden.flatten(0, 1), known, steps))
        for step in range(steps):
            for rows, logits in head(f"linears.{step}.weight", x[:, step].reshape(count, frames, -1)):
                yield step + 1, rows, logits


def _names(file: TensorFile) -> list[str]:
    return [name for name in file.specs if name.isdigit()]
