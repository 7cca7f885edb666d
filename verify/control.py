"""The control: what plain rounding makes of the same checkpoint, computed beside a bundle and never stored.

A bundle is judged against it: how much 4 bit cost depends on the checkpoint, on its depth most of all.
"""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from ..convert.bundle.reader import Bundle
from ..convert.bundle.recipe import DTYPES
from ..convert.errors import UserError
from ..convert.parallel import cores
from ..convert.tensorfile import DTYPES as NUMPY_DTYPES
from ..model.forward import Tokens
from ..model.reference import TorchModel
from ..model.weights import to_numpy, to_torch
from ..quant.affine import round_into
from ..quant.casting import cast

_Round = Callable[[str, int | None, Tensor], Tensor]


def control_of(reference: TorchModel, stored: Bundle, pool: ThreadPoolExecutor, bits: int | None = None) -> TorchModel:
    """Return the reference over a checkpoint in which every tensor that a bundle quantizes is rounded to nearest.

    Each at its own group size, scales and biases in the bundle's dtype, as ``mx.quantize`` chooses them; bits: None for
    those of each tensor. What the bundle keeps as floats is cast to its dtype. Nothing is held: tensors are rounded
    when they are read.
    """
    storage = NUMPY_DTYPES[DTYPES[stored.manifest.dtype]]

    def plain(name: str, step: int | None, values: Tensor) -> Tensor:
        array = to_numpy(values.cpu()).reshape(-1, values.shape[-1])
        quantization = stored.output(name, step).quantization
        if quantization is None:
            return to_torch(cast(array, storage).array).reshape(values.shape)
        width, size = quantization.bits if bits is None else bits, quantization.group_size
        height = max(1, -(-len(array) // cores()))
        rounded = np.empty(array.shape, np.float32)
        some = [slice(first, first + height) for first in range(0, len(array), height)]
        try:
            list(pool.map(lambda part: round_into(rounded[part], array[part], width, size, storage), some))
        except ValueError as error:
            raise UserError(f"{name} at {width} bit: {error}") from None
        return torch.from_numpy(rounded).reshape(values.shape)

    weights, rows = reference.weights, reference.rows
    return replace(
        reference,
        weights=lambda name, step: plain(name, step, weights(name, step)),
        rows=lambda name, tokens: _looked_up(plain, rows, name, tokens),
    )


def _looked_up(plain: _Round, rows: Callable[[str, Tokens], Tensor], name: str, tokens: Tokens) -> Tensor:
    """Return rows of a table, each rounded once."""
    ids, inverse = np.unique(tokens, return_inverse=True)
    return plain(name, None, rows(name, ids))[torch.from_numpy(inverse.reshape(tokens.shape))]
