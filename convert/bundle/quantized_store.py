"""Matrices quantized by layer-wise GPTQ, kept beside the bundle until it is complete: killed runs resume from them."""

import json
import shutil
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from threading import Lock
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from ...quant.affine import QuantizationConfig, Quantized, dequantize
from ..tensorfile import Spec, TensorFile, TensorWriter
from .output_tensor import Output
from .records import Adjustment, CalibrationRecord
from .workspace import write_durably

MatrixKey = tuple[str, int]  # a source tensor, and the depformer step stacked in it (0 where none is)
_INDEX = "solution.json"
_DTYPES = {"weight": "U32", "scales": "F32", "biases": "F32"}


class QuantizedStore:
    """A folder of quantized matrices, for one conversion only; a context manager.

    mark: what stands for all that decides them; a folder of another mark is begun anew. adjusted: what had to be done
    otherwise for a matrix than was asked for, as the manifest says it.
    """

    def __init__(self, folder: Path, mark: str) -> None:
        """Open the folder, or start it anew."""
        self.folder, self.mark = folder, mark
        self.files: dict[MatrixKey, str] = {}
        self.adjusted: dict[MatrixKey, Adjustment] = {}
        self._open: dict[str, TensorFile] = {}
        self._lock = Lock()
        if not self._resume():
            shutil.rmtree(folder, ignore_errors=True)
            folder.mkdir(parents=True)
            self._note([])

    def refresh(self) -> None:
        """Take over what another process has added."""
        self._resume()

    def _resume(self) -> bool:
        """Take over what an earlier run left."""
        try:
            index = json.loads((self.folder / _INDEX).read_text("utf-8"))
            if index["mark"] != self.mark:
                return False
            files = {(str(name), int(part)): str(file) for name, part, file in index["parts"]}
            if not all((self.folder / file).is_file() for file in set(files.values())):
                return False
            adjusted = {
                (str(name), int(part)): Adjustment.from_json(how) for name, part, how in index.get("adjusted", [])
            }
            self.files, self.adjusted = files, adjusted
            return True
        except (OSError, ValueError, LookupError, TypeError, AttributeError):
            return False

    def _note(self, more: list[tuple[str, int, str]]) -> None:
        parts = [(name, part, file) for (name, part), file in self.files.items()] + more
        adjusted = [(name, part, how.to_json()) for (name, part), how in self.adjusted.items()]
        write_durably(self.folder / _INDEX, json.dumps({"mark": self.mark, "parts": parts, "adjusted": adjusted}))
        self.files |= {(name, part): file for name, part, file in more}

    def add(
        self,
        block: str,
        matrices: Mapping[MatrixKey, Quantized],
        adjusted: Mapping[MatrixKey, Adjustment] | None = None,
    ) -> None:
        """Write the matrices of one block, all or none, and what was adjusted for them."""
        file, arrays = f"{block}.safetensors", list(_arrays(matrices))
        temporary = self.folder / f"{file}.partial"
        specs = [Spec(key, _DTYPES[key.rpartition(".")[2]], array.shape) for key, array in arrays]
        writer = TensorWriter(temporary, specs, {})
        try:
            for key, array in arrays:
                writer.append(key, array)
            writer.finish()
        finally:
            writer.close()
        temporary.replace(self.folder / file)
        self.adjusted |= adjusted or {}
        self._note([(name, part, file) for name, part in matrices])

    def rows(self, part: MatrixKey) -> int:
        """Return how many rows a quantized matrix has."""
        return self._file(part).specs[f"{part[0]}.{part[1]}.weight"].shape[0]

    def _file(self, part: MatrixKey) -> TensorFile:
        name = self.files[part]
        with self._lock:
            if name not in self._open:
                self._open[name] = TensorFile(self.folder / name)
            return self._open[name]

    def read(self, part: MatrixKey, first: int, last: int, storage: np.dtype[Any]) -> Quantized:
        """Return rows of a quantized matrix; scales and biases as they are stored. Its errors are not known here."""
        file = self._file(part)
        weight, scales, biases = (file.read(f"{part[0]}.{part[1]}.{kind}", first, last) for kind in _DTYPES)
        return Quantized(weight, scales.astype(storage), biases.astype(storage), 0.0, 0.0, 0, 0)

    def make(self, output: Output, first: int, array: NDArray[Any], storage: np.dtype[Any]) -> Quantized:
        """Return rows of an output, from ``first`` on; array: the same rows of the source, for the error."""
        if output.quantization is None:
            raise ValueError(f"{output.name} stays float")
        part, row = divmod(output.rows[0] + first, _height(output))
        matrix = self.read((output.role.name, part), row, row + len(array), storage)
        wide = array.astype(np.float32)
        difference = wide - dequantize(matrix, output.quantization)
        error, norm = (float(np.square(values, dtype=np.float64).sum()) for values in (difference, wide))
        return Quantized(matrix.weight, matrix.scales, matrix.biases, error, norm, 0, 0)

    def adjustments(self, output: Output) -> tuple[tuple[int | None, Adjustment], ...]:
        """Return what was adjusted for an output, by its depformer steps (None where none are stacked)."""
        first = output.rows[0] // _height(output)
        parts = [(part, self.adjusted.get((output.role.name, part))) for part in range(first, first + output.parts)]
        stacked = output.role.stacked > 1
        return tuple((part if stacked else None, how) for part, how in parts if how)

    def close(self) -> None:
        """Close its files."""
        for file in self._open.values():
            file.close()
        self._open.clear()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _arrays(matrices: Mapping[MatrixKey, Quantized]) -> Iterator[tuple[str, NDArray[Any]]]:
    for (name, part), made in matrices.items():
        yield f"{name}.{part}.weight", made.weight
        yield f"{name}.{part}.scales", made.scales.astype(np.float32)
        yield f"{name}.{part}.biases", made.biases.astype(np.float32)


@dataclass(frozen=True)
class LayerwiseQuantizer:
    """What quantizes matrices that need more than themselves. record: what the manifest says of it.

    solve: fills a store, which an earlier run may have begun.
    """

    record: CalibrationRecord
    quantize: Callable[[QuantizedStore], None]


def quantizations_of(outputs: list[Output]) -> dict[MatrixKey, tuple[QuantizationConfig, str]]:
    """Return how each part of each source tensor is quantized, and the dtype of its scales and biases."""
    quantizations: dict[MatrixKey, tuple[QuantizationConfig, str]] = {}
    for output in outputs:
        if output.quantization:
            for part in range(output.rows[0] // _height(output), output.rows[1] // _height(output)):
                quantizations[output.role.name, part] = (output.quantization, output.dtype)
    return quantizations


def _height(output: Output) -> int:
    """Return how many rows each part of its source tensor has."""
    return (output.rows[1] - output.rows[0]) // output.parts if output.role.stacked > 1 else output.rows[1]
