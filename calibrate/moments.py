"""The inputs of matrices in the original and in the quantized model, and the sums over them that GPTQ needs."""

from contextlib import suppress
from dataclasses import replace

import torch
from torch import Tensor

from ..convert.bundle.quantized_store import MatrixKey
from ..convert.source.tensors import roles
from ..model.blocks import POSITIONS, Block
from ..model.reference import TorchModel
from ..quant.gptq import Inputs, Moments, add_symmetric_product, mirror
from .work import LAST, are_few
from .workers import Workers

_ALONE = Workers()
_LAST = tuple(f"{module}.weight" for module in LAST)
StreamPair = tuple[Tensor, Tensor]  # in front of a block, of the original and the quantized model: ``[frames, rows]``
MatrixInputs = dict[MatrixKey, Tensor]  # ``[frames, columns]`` each


class _AllCapturedError(Exception):
    """All inputs that were asked for are captured: the rest of the block need not be computed."""


class _Sums:
    """Moments as they are summed up; the inputs themselves if they are few. frames: of all workers."""

    def __init__(self, columns: int, frames: int, device: str) -> None:
        self.device, self.frames = device, frames
        self.kept: list[tuple[Tensor, ...]] | None = [] if are_few(frames, columns) else None
        self.residual: Tensor | None = None
        if self.kept is None:
            self.second = torch.zeros((columns, columns), device=device)
            self.cross = torch.zeros((columns, columns), device=device)

    def add(self, original: Tensor, quantized: Tensor, streams: StreamPair | None) -> None:
        """Add the inputs ``[frames, columns]`` of some frames; streams: see ``moments_of``."""
        original, quantized = (x.to(self.device, torch.float32) for x in (original, quantized))
        lacking = None if streams is None else (streams[0] - streams[1]).to(self.device)
        if self.kept is not None:
            self.kept.append((original, quantized) if lacking is None else (original, quantized, lacking))
            return
        add_symmetric_product(self.second, quantized)
        self.cross.addmm_(original.T, quantized)
        if lacking is not None:
            if self.residual is None:
                self.residual = torch.zeros((lacking.shape[1], quantized.shape[1]), device=self.device)
            self.residual.addmm_(lacking.T, quantized)

    def moments(self, workers: Workers) -> Moments | Inputs:
        """Return those of the inputs of all workers."""
        if self.kept is not None:
            own = [parts[0] if len(parts) == 1 else torch.cat(parts) for parts in zip(*self.kept, strict=True)]
            return Inputs(*(workers.concatenated(part)[0] for part in own))
        workers.add_up(self.second, self.cross, *([] if self.residual is None else [self.residual]))
        mirror(self.second)
        return Moments(self.second, self.cross, self.residual, self.frames)


def moments_of(
    original: Tensor,
    quantized: Tensor,
    device: str,
    streams: StreamPair | None = None,
    workers: Workers = _ALONE,
    frames: int | None = None,
) -> Moments | Inputs:
    """Return the moments of inputs ``[frames, columns]`` of the original and of the quantized model, on a device.

    streams: what the matrix's output is added to, if anything. workers: each gives its own frames, one at least, and
    gets the moments of all. frames: of all workers; None: they are counted.
    """
    sums = _Sums(original.shape[-1], workers.total(len(original)) if frames is None else frames, device)
    for first in range(0, len(original), POSITIONS):
        rows = slice(first, first + POSITIONS)
        sums.add(original[rows], quantized[rows], streams and (streams[0][rows], streams[1][rows]))
    return sums.moments(workers)


def block_moments(
    models: dict[str, TorchModel],
    block: Block,
    keys: list[MatrixKey],
    streams: dict[str, Tensor],
    workers: Workers = _ALONE,
) -> dict[MatrixKey, Moments | Inputs]:
    """Return the moments of the inputs of a block's matrices; streams: the inputs of the block, by model.

    workers: each gives streams of its own, one row at least, and gets the moments of all.
    """
    sums: dict[MatrixKey, _Sums] = {}
    count = workers.total(len(streams["original"]))
    for rows in block.batches(streams["original"].shape):
        inputs = {name: _captured(model, block, keys, streams[name][rows]) for name, model in models.items()}
        for key in keys:
            original, quantized = inputs["original"][key], inputs["quantized"][key]
            if key not in sums:
                frames = len(original) * count // len(streams["original"][rows])
                sums[key] = _Sums(original.shape[-1], frames, models["original"].device)
            in_front = added_to(block, key, {name: stream[rows] for name, stream in streams.items()})
            sums[key].add(original, quantized, in_front)
    return {key: of_inputs.moments(workers) for key, of_inputs in sums.items()}


def added_to(block: Block, key: MatrixKey, streams: dict[str, Tensor]) -> StreamPair | None:
    """Return the parts of the streams in front of a block that a matrix's output is added to, None if it is not."""
    if not key[0].endswith(_LAST):
        return None
    original, quantized = streams["original"], streams["quantized"]
    if block.component == "depformer":
        name, number = key
        step = number if block.sublayer == "attention" else int(name.split(".gating.")[1].split(".")[0])
        return original[:, step], quantized[:, step]
    return original.reshape(-1, original.shape[-1]), quantized.reshape(-1, quantized.shape[-1])


def block_inputs(model: TorchModel, block: Block, keys: list[MatrixKey], stream: Tensor) -> MatrixInputs:
    """Return the inputs ``[frames, columns]`` of a block's matrices for a whole stream."""
    whole: MatrixInputs = {}
    done = 0
    for rows in block.batches(stream.shape):
        for key, part in _captured(model, block, keys, stream[rows]).items():
            if key not in whole:
                each = len(part) // len(stream[rows])
                whole[key] = torch.empty((each * len(stream), part.shape[1]), dtype=part.dtype, device=part.device)
            whole[key][done * each : done * each + len(part)] = part
        done += len(stream[rows])
    return whole


def _captured(model: TorchModel, block: Block, keys: list[MatrixKey], x: Tensor) -> MatrixInputs:
    """Return the inputs ``[rows, columns]`` of matrices, from computing the block as far as it takes.

    Of depformer steps each has its own: products that no wanted input depends on are not computed.
    """
    captured: MatrixInputs = {}
    described = roles(model.architecture)
    of_last = keys[0][0].endswith(_LAST)

    def capture(name: str, step: int | None, matrix_input: Tensor) -> Tensor | None:
        key = (name, step or 0)
        if key in keys:
            captured[key] = matrix_input.reshape(-1, matrix_input.shape[-1])
            if len(captured) == len(keys):
                raise _AllCapturedError
        elif of_last and not name.endswith(_LAST):
            return None
        return matrix_input.new_zeros(()).expand(*matrix_input.shape[:-1], described[name].height)

    with suppress(_AllCapturedError):
        replace(model, input_hook=capture).added(block, x)
    return captured
