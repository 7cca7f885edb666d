"""Bit allocation: one quantization setting for each group of tensors, at the least total cost within a byte budget."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

STATES = 1 << 17  # distinct sizes in the dynamic program, at most


@dataclass(frozen=True)
class Option:
    """One setting of one group: its size in bytes and its cost."""

    nbytes: int
    cost: float


@dataclass(frozen=True)
class Selection:
    """The index of an option for each group. bound: a lower bound on the cost of any allocation within the budget."""

    chosen: list[int]
    nbytes: int
    cost: float
    bound: float


def allocate_bits(groups: Sequence[Sequence[Option]], budget: int, states: int = STATES) -> Selection:
    """Choose one option for each group (a multiple-option knapsack) by dynamic programming over sizes.

    Sizes are counted in the greatest common divisor of their differences. Where that gives more than ``states`` sizes,
    they are rounded to a larger unit: the result is still within the budget, and ``bound``, from the dual problem, says
    how far from optimal it can be. Raises ValueError if even the smallest options exceed the budget.
    """
    smallest = [min(option.nbytes for option in group) for group in groups]
    free = budget - sum(smallest)
    if free < 0:
        raise ValueError(f"the smallest settings take {sum(smallest)} bytes")
    unit, exact = _unit(groups, smallest, free, states)
    width = free // unit + 1
    best = np.zeros(width)
    taken = np.empty((len(groups), width), np.uint8)
    steps = [
        [_rounded(option.nbytes - least, unit) for option in group]
        for group, least in zip(groups, smallest, strict=True)
    ]
    for number, group in enumerate(groups):
        best = _extend(best, group, steps[number], taken[number])
    for size in reversed(range(width)):  # at size 0 every option is the smallest, which fits
        chosen = _chosen(taken, steps, size)
        options = [group[index] for group, index in zip(groups, chosen, strict=True)]
        if sum(option.nbytes for option in options) <= budget:
            break
    cost = math.fsum(option.cost for option in options)
    bound = cost if exact else min(cost, _dual(groups, budget))
    return Selection(chosen, sum(option.nbytes for option in options), cost, bound)


def _rounded(nbytes: int, unit: int) -> int:
    """Return a size in units, rounded to the nearest; only 0 bytes are 0 units."""
    return max((2 * nbytes + unit) // (2 * unit), min(nbytes, 1))


def _chosen(taken: NDArray[np.uint8], steps: Sequence[Sequence[int]], size: int) -> list[int]:
    """Return the options that add up to a size."""
    chosen = []
    for number in reversed(range(len(steps))):
        chosen.append(int(taken[number, size]))
        size -= steps[number][chosen[-1]]
    return chosen[::-1]


def _unit(groups: Sequence[Sequence[Option]], smallest: Sequence[int], free: int, states: int) -> tuple[int, bool]:
    """Return the unit of sizes in bytes, and whether all sizes are multiples of it."""
    differences = (option.nbytes - least for group, least in zip(groups, smallest, strict=True) for option in group)
    common = math.gcd(*differences) or 1
    unit = max(common, -(-free // states))
    return unit, unit == common


def _extend(
    best: NDArray[np.float64], group: Sequence[Option], steps: Sequence[int], taken: NDArray[np.uint8]
) -> NDArray[np.float64]:
    """Return the least cost at each size with one more group; writes the option that gives it to ``taken``."""
    least = np.full(len(best), np.inf)
    for index, (option, step) in enumerate(zip(group, steps, strict=True)):
        if step < len(best):
            cost = np.full(len(best), np.inf)
            cost[step:] = best[: len(best) - step] + option.cost
            better = cost < least
            least[better], taken[better] = cost[better], index
    return least


def _dual(groups: Sequence[Sequence[Option]], budget: int) -> float:
    """Return the best lower bound from a price per byte: the maximum of the Lagrangian dual, which is concave."""

    def value(price: float) -> tuple[float, int]:
        cheapest = [
            min(group, key=lambda option: (option.cost + price * option.nbytes, option.nbytes)) for group in groups
        ]
        nbytes = sum(option.nbytes for option in cheapest)
        return math.fsum(option.cost for option in cheapest) + price * (nbytes - budget), nbytes

    low, high = 0.0, 1e-30
    while value(high)[1] > budget and high < 1e30:
        high *= 2
    best = max(value(low)[0], value(high)[0])
    for _ in range(100):
        middle = (low + high) / 2
        bound, nbytes = value(middle)
        best = max(best, bound)
        low, high = (middle, high) if nbytes > budget else (low, middle)
    return best
