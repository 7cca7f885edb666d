"""How errors of rounded columns are passed on to the columns behind them, in GPTQ."""

from collections.abc import Iterator
from functools import partial

import torch
from torch import Tensor

from .devices import on_either

COLUMNS = 512  # of a window: errors of columns before it are passed on to it in one product
NEAR = 8  # groups behind a group that its errors reach at once, on a GPU


class Passing:
    """What passes errors on, for the factor R of damped moments; see ``rounding.round_columns``.

    inverses: of the factor's squares on the diagonal, ``[groups, size, size]``. A group is rounded to the values that
    make ``(goal - rounded) @ R`` zero in its columns: the goal, and what each earlier loss adds, which is R times the
    inverse of the group.
    """

    def __init__(self, factor: Tensor, size: int) -> None:
        """factor: ``[columns, columns]``, upper triangular. size: of a group."""
        squares = factor.unfold(0, size, size).unfold(1, size, size).diagonal().permute(2, 0, 1)
        identity = torch.eye(size, dtype=factor.dtype, device=factor.device).expand_as(squares)
        self._factor, self._size = factor, size
        self.inverses = on_either(partial(torch.linalg.solve_triangular, upper=True), squares, identity)

    def groups(self, lost: Tensor) -> Iterator[Tensor]:
        """Give each group ``[rows, size]`` as the groups before it have changed it; round it before the next.

        lost: ``[rows, columns]``, goal - rounded in the columns that are rounded, and the goal in the others.
        """
        for first in range(0, lost.shape[1], self._size):
            last, start = first + self._size, first - first % COLUMNS
            if first == start:
                window = self._window(start)
                ahead = torch.addmm(lost[:, start : start + COLUMNS], lost[:, :start], window[:start])
            inside = slice(first - start, last - start)
            yield torch.addmm(ahead[:, inside], lost[:, start:first], window[start:first, inside])

    def near_and_far(self) -> tuple[Tensor, Tensor]:
        """Return what the losses of each group add to the ``NEAR`` groups behind it, and to those behind them.

        ``[groups, size, NEAR * size]``, and ``[columns, columns + NEAR * size]``, which is zero in each group's own
        columns and in the ``NEAR`` groups behind it. Both are zero beyond the last column.
        """
        size, columns = self._size, len(self._factor)
        width = columns + NEAR * size
        far = self._factor.new_zeros((columns, width))
        for start in range(0, columns, COLUMNS):
            window = self._window(start)
            far[: len(window), start : start + window.shape[1]] = window
        shape, strides = (columns // size, size), (size * width + size, width)
        near = far.as_strided((*shape, NEAR * size), (*strides, 1), size).clone()
        far.as_strided((*shape, NEAR * size + size), (*strides, 1)).zero_()
        return near, far

    def _window(self, start: int) -> Tensor:
        """Return what each loss adds to the columns from ``start`` on, as far as a window goes."""
        factor = self._factor[: start + COLUMNS, start : start + COLUMNS]
        of_groups = factor.reshape(len(factor), -1, self._size).transpose(0, 1)
        inverses = self.inverses[start // self._size :][: len(of_groups)]
        return (of_groups @ inverses).transpose(0, 1).flatten(1)
