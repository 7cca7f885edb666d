"""Operations that some devices lack."""

from collections.abc import Callable, Iterable

import torch
from torch import Tensor


def on_either(function: Callable[..., Tensor], *values: Tensor) -> Tensor:
    """Compute on the values' device, or on the CPU where that lacks the operation; the result is where they are."""
    (result,) = _all_on_either(lambda *there: (function(*there),), *values)
    return result


def cholesky(matrices: Tensor) -> tuple[Tensor, Tensor]:
    """Return the lower Cholesky factors of matrices ``[..., n, n]``, and which of them have one, ``[...]``.

    Does not wait for a GPU, as ``torch.linalg.cholesky`` does to raise an error.
    """
    factors, info = _all_on_either(torch.linalg.cholesky_ex, matrices)
    return factors, info == 0


def _all_on_either(function: Callable[..., Iterable[Tensor]], *values: Tensor) -> Iterable[Tensor]:
    """Compute several results as ``on_either`` does."""
    try:
        return function(*values)
    except NotImplementedError:
        return [each.to(values[0].device) for each in function(*(value.cpu() for value in values))]
