"""Making the bundle's files: blocks of rows flow from the checkpoint through the quantizer to the disk."""

from collections.abc import Iterator
from dataclasses import dataclass, field, replace
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
from .records import Adjustment, TensorRecord, VoiceRecord


@dataclass(frozen=True)
class RowBlock:
    """Rows ``first`` to ``last`` of an output, all of one depformer step where several are stacked.

    importance: of its columns, None where errors are not weighted.
    """

    output: Output
    part: int
    first: int
    last: int
    importance: NDArray[np.float64] | None = None


@dataclass
class ErrorStats:
    """The quantization error of an output, summed over its blocks, for each stacked step apart."""

    squared_error: NDArray[np.float64]
    squared_norm: NDArray[np.float64]
    overflowed: int = 0
    flushed: int = 0
    scales_and_biases: list[tuple[NDArray[Any], NDArray[Any]]] = field(default_factory=list)

    def add(self, part: int, result: Quantized | Cast) -> None:
        """Count one block."""
        self.overflowed += result.overflowed
        self.flushed += result.flushed
        if isinstance(result, Quantized):
            self.squared_error[part] += result.squared_error
            self.squared_norm[part] += result.squared_norm
            self.scales_and_biases.append((result.scales, result.biases))

    def record(
        self, file: str, output: Output, adjusted: tuple[tuple[int | None, Adjustment], ...], crc32: tuple[str, ...]
    ) -> TensorRecord:
        """Return what the manifest records of this output of a file."""
        record = TensorRecord(
            file,
            output.role.name,
            output.rows,
            tuple(spec.name for spec in output.specs()),
            overflowed=self.overflowed,
            flushed=self.flushed,
            adjusted=adjusted,
            crc32=crc32,
        )
        if output.quantization is None:
            return record
        pairs = zip(self.squared_error, self.squared_norm, strict=True) if output.parts > 1 else ()
        return replace(
            record,
            bits=output.quantization.bits,
            group_size=output.quantization.group_size,
            method=output.quantization.method,
            weighted_by=output.weighted_by or None,
            relative_rmse=_rounded(relative_rmse(float(self.squared_error.sum()), float(self.squared_norm.sum()))),
            relative_rmse_by_step=tuple(_rounded(relative_rmse(float(e), float(n))) for e, n in pairs),
        )


def _rounded(value: float) -> float:
    return float(f"{value:.6g}")


def blocks(outputs: tuple[Output, ...], checkpoint: Checkpoint) -> Iterator[RowBlock]:
    """Cut outputs into blocks of about BLOCK_WEIGHTS weights; how does not depend on the machine."""
    for output in outputs:
        importance = checkpoint.importance(output.role.name) if output.weighted_by else None
        rows = output.rows[1] - output.rows[0]
        height = rows // output.parts
        step = max(1, BLOCK_WEIGHTS // output.shape[-1])
        for part in range(output.parts):
            for first in range(part * height, (part + 1) * height, step):
                yield RowBlock(output, part, first, min(first + step, (part + 1) * height), importance)


def _make(checkpoint: Checkpoint, block: RowBlock, store: QuantizedStore | None) -> Quantized | Cast:
    """Read a block and quantize or cast it, or take it from the store."""
    output, start = block.output, block.output.rows[0]
    array = checkpoint.read(output.role.name, start + block.first, start + block.last, once=True)
    if output.quantization is None:
        return cast(array, DTYPES[output.dtype])
    if output.quantization.method in DATA_DRIVEN:
        if store is None:
            raise ValueError(f"{output.role.name} is quantized with data, and no store is given")
        return store.make(output, block.first, array, DTYPES[output.dtype])
    try:
        return quantize(array, output.quantization, DTYPES[output.dtype], block.importance)
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
) -> tuple[str, tuple[TensorRecord, ...]]:
    """Write a file of tensors; return its sha256 and the manifest's entry for each output.

    store: the matrices that were quantized with data.
    """
    writer = TensorWriter(path, [spec for output in file.outputs for spec in output.specs()], METADATA)
    records: list[TensorRecord] = []
    bar.update(writer.header_bytes)
    try:
        results = in_order(
            lambda block: (block, _make(checkpoint, block, store)), blocks(file.outputs, checkpoint), workers
        )
        stats = _no_error(file.outputs[0])
        for block, result in results:
            output = block.output
            stats.add(block.part, result)
            weight = result.weight if isinstance(result, Quantized) else result.array
            bar.update(writer.append(output.name, weight))
            if block.last == output.rows[1] - output.rows[0]:
                for spec, parts in zip(output.specs()[1:], zip(*stats.scales_and_biases, strict=True), strict=True):
                    bar.update(writer.append(spec.name, np.concatenate(parts)))
                crc32 = tuple(f"{writer.checksums[spec.name]:08x}" for spec in output.specs())
                adjusted = store.adjustments(output) if store and output.quantization else ()
                records.append(stats.record(file.name, output, adjusted, crc32))
                stats = _no_error(file.outputs[min(len(records), len(file.outputs) - 1)])
        return writer.finish(), tuple(records)
    finally:
        writer.close()


def _no_error(output: Output) -> ErrorStats:
    return ErrorStats(np.zeros(output.parts), np.zeros(output.parts))


def write_voice(
    path: Path, file: PlannedFile, voice: Voice, specs: list[Spec], bar: "tqdm[Any]"
) -> tuple[str, tuple[VoiceRecord, ...]]:
    """Write one voice preset; return the file's sha256, and a record if embeddings do not fit the dtype."""
    embeddings = cast(voice.embeddings, DTYPES[specs[1].dtype])
    writer = TensorWriter(path, specs, METADATA)
    bar.update(writer.header_bytes)
    try:
        bar.update(writer.append("cache", voice.cache.astype(DTYPES[specs[0].dtype])))
        bar.update(writer.append("embeddings", embeddings.array))
        changed = embeddings.overflowed or embeddings.flushed
        record = VoiceRecord(file.name, embeddings.overflowed, embeddings.flushed)
        return writer.finish(), (record,) if changed else ()
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


def write_bytes(path: Path, data: bytes, bar: "tqdm[Any]") -> str:
    """Write a file of what is in memory; return its sha256."""
    target = HashingFile(path)
    try:
        target.append(data)
        bar.update(target.size)
        return target.finish()
    finally:
        target.close()
