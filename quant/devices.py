"""Operations that some devices lack."""

from collections.abc import Callable

from torch import Tensor


def on_either(function: Callable[..., Tensor], *values: Tensor) -> Tensor:
    """Compute on the values' device, or on the CPU where that lacks the operation; the result is where they are."""
    try:
        return function(*values)
    except NotImplementedError:
        return function(*(value.cpu() for value in values)).to(values[0].device)
