"""Making the bundle's files: blocks of rows flow from the checkpoint through the quantizer to the disk."""

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from tqdm import tqdm

from ...quant.affine import DATA_DRIVEN, Quantized, quantize, relative_rmse
from ...quant.casting import Cast, cast
from ..errors import UserError
from ..parallel import in_order
from ..source.checkpoint import Checkpoint
from ..source.scan import BLOCK
from ..source.voices import Voice
from ..tensorfile import DTYPES, HashingFile, Spec, TensorWriter
from .output_tensor import Output
from .plan import BLOCK_WEIGHTS, METADATA, PlannedFile
from .quantized_store import QuantizedStore


@dataclass(frozen=True)
class RowBlock:
    """Rows ``first`` to ``last`` of an output, all of one depformer step where several are stacked."""

    output: Output
    part: int
    first: int
    last: int


@dataclass
class ErrorStats:
    """What an output lost, summed over its blocks and kept for each stacked step apart."""

    squared_error: NDArray[np.float64]
    squared_norm: NDArray[np.float64]
    overflowed: int = 0
    flushed: int = 0
    sides: list[tuple[NDArray[Any], NDArray[Any]]] = field(default_factory=list)

    def add(self, part: int, made: Quantized | Cast) -> None:
        """Count one block."""
        self.overflowed += made.overflowed
        self.flushed += made.flushed
        if isinstance(made, Quantized):
            self.squared_error[part] += made.squared_error
            self.squared_norm[part] += made.squared_norm
            self.sides.append((made.scales, made.biases))

    def record(self, output: Output) -> dict[str, Any]:
        """Return the manifest's entry for this output."""
        entry: dict[str, Any] = {
            "source": output.role.name,
            "rows": list(output.rows),
            "outputs": [spec.name for spec in output.specs()],
        }
        if output.quantization:
            total = relative_rmse(float(self.squared_error.sum()), float(self.squared_norm.sum()))
            entry |= {
                "bits": output.quantization.bits,
                "group_size": output.quantization.group_size,
                "method": output.quantization.method,
                "relative_rmse": _rounded(total),
            }
            if output.parts > 1:
                pairs = zip(self.squared_error, self.squared_norm, strict=True)
                entry["relative_rmse_by_step"] = [_rounded(relative_rmse(float(e), float(n))) for e, n in pairs]
        if self.overflowed or self.flushed:
            entry |= {"overflowed": self.overflowed, "flushed": self.flushed}
        return entry


def _rounded(value: float) -> float:
    return float(f"{value:.6g}")


def blocks(outputs: tuple[Output, ...]) -> Iterator[RowBlock]:
    """Cut outputs into blocks of about BLOCK_WEIGHTS weights; how does not depend on the machine."""
    for output in outputs:
        rows = output.rows[1] - output.rows[0]
        height = rows // output.parts
        step = max(1, BLOCK_WEIGHTS // output.shape[-1])
        for part in range(output.parts):
            for first in range(part * height, (part + 1) * height, step):
                yield RowBlock(output, part, first, min(first + step, (part + 1) * height))


def _make(checkpoint: Checkpoint, block: RowBlock, store: QuantizedStore | None) -> Quantized | Cast:
    """Read a block and quantize or cast it, or take what was solved for it."""
    output, start = block.output, block.output.rows[0]
    array = checkpoint.read(output.role.name, start + block.first, start + block.last, once=True)
    if output.quantization is None:
        return cast(array, DTYPES[output.dtype])
    if output.quantization.method in DATA_DRIVEN:
        if store is None:
            raise ValueError(f"{output.role.name} was not solved")
        return store.make(output, block.first, array, DTYPES[output.dtype])
    try:
        return quantize(array, output.quantization, DTYPES[output.dtype])
    except ValueError as error:
        raise UserError(
            f"{output.role.name}: {error}: did the source change meanwhile? Run the command again"
        ) from None


def write_tensors(
    path: Path,
    file: PlannedFile,
    checkpoint: Checkpoint,
    workers: int,
    bar: "tqdm[Any]",
    store: QuantizedStore | None = None,
) -> tuple[str, list[dict[str, Any]]]:
    """Write a file of tensors; return its sha256 and the manifest's entry for each output.

    solution: holds what was solved of them.
    """
    writer = TensorWriter(path, [spec for output in file.outputs for spec in output.specs()], METADATA)
    entries = []
    bar.update(writer.header_bytes)
    try:
        made = in_order(lambda block: (block, _make(checkpoint, block, store)), blocks(file.outputs), workers)
        loss = _no_loss(file.outputs[0])
        for block, result in made:
            output = block.output
            loss.add(block.part, result)
            weight = result.weight if isinstance(result, Quantized) else result.array
            bar.update(writer.append(output.name, weight))
            if block.last == output.rows[1] - output.rows[0]:
                for spec, side in zip(output.specs()[1:], zip(*loss.sides, strict=True), strict=True):
                    bar.update(writer.append(spec.name, np.concatenate(side)))
                checksums = [f"{writer.checksums[spec.name]:08x}" for spec in output.specs()]
                adjusted = store.adjustments(output) if store and output.quantization else []
                entries.append(
                    loss.record(output) | ({"adjusted": adjusted} if adjusted else {}) | {"crc32": checksums}
                )
                loss = _no_loss(file.outputs[min(len(entries), len(file.outputs) - 1)])
        return writer.finish(), entries
    finally:
        writer.close()


def _no_loss(output: Output) -> ErrorStats:
    return ErrorStats(np.zeros(output.parts), np.zeros(output.parts))


def write_voice(path: Path, voice: Voice, specs: list[Spec], bar: "tqdm[Any]") -> tuple[str, list[dict[str, Any]]]:
    """Write one voice preset; return the file's sha256 and an entry if embeddings did not fit the dtype."""
    embeddings = cast(voice.embeddings, DTYPES[specs[1].dtype])
    writer = TensorWriter(path, specs, METADATA)
    bar.update(writer.header_bytes)
    try:
        bar.update(writer.append("cache", voice.cache.astype(DTYPES[specs[0].dtype])))
        bar.update(writer.append("embeddings", embeddings.array))
        entries: list[dict[str, Any]] = []
        if embeddings.overflowed or embeddings.flushed:
            entries.append({"overflowed": embeddings.overflowed, "flushed": embeddings.flushed})
        return writer.finish(), entries
    finally:
        writer.close()


def write_copy(path: Path, source: Path, sha256: str, bar: "tqdm[Any]") -> str:
    """Copy a file byte by byte; returns its sha256, raises UserError if it is no longer the one that was scanned."""
    target = HashingFile(path)
    try:
        with source.open("rb", buffering=0) as file:
            while block := file.read(BLOCK):
                target.append(block)
                bar.update(len(block))
        if target.finish() != sha256:
            raise UserError(f"{source}: changed while it was converted: run the command again")
        return sha256
    finally:
        target.close()


def write_text(path: Path, text: str, bar: "tqdm[Any]") -> str:
    """Write a text file; return its sha256."""
    target = HashingFile(path)
    try:
        target.append(text.encode())
        bar.update(target.size)
        return target.finish()
    finally:
        target.close()
