"""Operations that some devices lack."""

from collections.abc import Callable

import torch
from torch import Tensor


def on_either(function: Callable[..., Tensor], *values: Tensor) -> Tensor:
    """Compute on the values' device, or on the CPU where that lacks the operation; the result is where they are."""
    try:
        return function(*values)
    except NotImplementedError:
        return function(*(value.cpu() for value in values)).to(values[0].device)


def cholesky(matrices: Tensor) -> tuple[Tensor, Tensor]:
    """Return the lower Cholesky factors of matrices ``[..., n, n]``, and which of them have one, ``[...]``.

    Does not wait for a GPU, as ``torch.linalg.cholesky`` does to raise an error.
    """
    try:
        factors, info = torch.linalg.cholesky_ex(matrices)
    except NotImplementedError:
        factors, info = (each.to(matrices.device) for each in torch.linalg.cholesky_ex(matrices.cpu()))
    return factors, info == 0
