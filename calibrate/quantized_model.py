"""What the quantized model reads while layer-wise GPTQ is at work: what is quantized so far, and the source's rest."""

import torch
from torch import Tensor

from ..convert.bundle.quantized_store import MatrixKey, QuantizedStore
from ..convert.source.source import Source
from ..convert.tensorfile import DTYPES
from ..model.forward import Tokens
from ..model.reference import Rows, Weights, source_rows, source_weights
from ..quant.affine import DATA_DRIVEN, QuantizationConfig, dequantize
from . import weight_only


def quantized_weights(
    source: Source, quantizations: dict[MatrixKey, tuple[QuantizationConfig, str]], store: QuantizedStore
) -> Weights:
    """Return a way to read the quantized model's matrices.

    Those of data-driven methods come from the store (from the source, as long as they are not in it), others are
    quantized by their method, and those without a quantization are the source's.
    """
    original = source_weights(source.checkpoint)

    def read(name: str, step: int | None) -> Tensor:
        key, weight = (name, step or 0), original(name, step)
        if key not in quantizations:
            return weight
        quantization, dtype = quantizations[key]
        if quantization.method not in DATA_DRIVEN:
            importance = source.checkpoint.importance(name)
            return weight_only.dequantized(name, weight, quantization, DTYPES[dtype], importance)
        if key not in store.files:
            return weight
        return torch.from_numpy(dequantize(store.read(key, 0, len(weight), DTYPES[dtype]), quantization))

    return read


def quantized_rows(source: Source, quantizations: dict[MatrixKey, tuple[QuantizationConfig, str]]) -> Rows:
    """Return a way to read rows of the quantized model's embedding tables."""
    original = source_rows(source.checkpoint)

    def read(name: str, tokens: Tokens) -> Tensor:
        rows = original(name, tokens)
        if (name, 0) not in quantizations:
            return rows
        quantization, dtype = quantizations[name, 0]
        return weight_only.dequantized(name, rows, quantization, DTYPES[dtype])

    return read
