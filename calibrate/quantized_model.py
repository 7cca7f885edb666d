"""What the quantized model reads while layer-wise GPTQ is at work: what is quantized so far, and the source's rest."""

from torch import Tensor

from ..convert.bundle.quantized_store import MatrixKey, QuantizedStore
from ..convert.source.source import Source
from ..convert.tensorfile import DTYPES
from ..model.forward import Tokens
from ..model.weights import Rows, Weights, each_once, sorted_rows, source_weights
from ..quant.affine import DATA_DRIVEN, QuantizationConfig
from ..quant.packed_matrix import packed_matrix
from . import weight_only


def quantized_weights(
    source: Source,
    quantizations: dict[MatrixKey, tuple[QuantizationConfig, str]],
    store: QuantizedStore,
    device: str = "cpu",
    unquantized: Weights | None = None,
) -> Weights:
    """Return a way to read the quantized model's matrices.

    Those of data-driven methods come from the store (from the source, as long as they are not in it), others are
    quantized by their method, and those without a quantization are the source's. device: where those of the store are
    dequantized. unquantized: what reads the source's, if something does already.
    """
    original = source_weights(source.checkpoint)
    of_source = unquantized or original

    def read(name: str, step: int | None) -> Tensor:
        key = (name, step or 0)
        if key not in quantizations:
            return of_source(name, step)
        quantization, dtype = quantizations[key]
        if quantization.method not in DATA_DRIVEN:
            importance = source.checkpoint.importance(name)
            return weight_only.dequantized(name, original(name, step), quantization, DTYPES[dtype], importance)
        if key not in store.files:
            return of_source(name, step)
        stored = store.read(key, 0, store.rows(key), DTYPES[dtype])
        return packed_matrix(stored).dequantized(quantization, device)

    return read


def quantized_rows(
    source: Source, quantizations: dict[MatrixKey, tuple[QuantizationConfig, str]], device: str = "cpu"
) -> Rows:
    """Return a way to read rows of the quantized model's embedding tables, onto a device."""
    original = sorted_rows(source.checkpoint)

    def read(name: str, ids: Tokens) -> Tensor:
        rows = original(name, ids)
        if (name, 0) not in quantizations:
            return rows
        quantization, dtype = quantizations[name, 0]
        return weight_only.dequantized(name, rows, quantization, DTYPES[dtype])

    return each_once(read, device)
