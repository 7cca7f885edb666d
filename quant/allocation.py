"""Which setting each part of a model gets, so that the sum of what they cost is least within a budget of bytes."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

STATES = 1 << 17  # sizes that are told apart at most


@dataclass(frozen=True)
class Option:
    """One setting of one part: its bytes, and what it costs."""

    nbytes: int
    cost: float


@dataclass(frozen=True)
class Selection:
    """A choice for each part, by index. bound: no allocation within the budget costs less."""

    chosen: list[int]
    nbytes: int
    cost: float
    bound: float


def allocate_bits(parts: Sequence[Sequence[Option]], budget: int, states: int = STATES) -> Selection:
    """Choose one setting for each part (a multiple-choice knapsack), by dynamic programming over their bytes.

    Sizes are told apart by the greatest common divisor of their differences; where that makes more than ``states``, by
    a larger unit, to which each is rounded: the budget holds all the same, and ``bound``, from the dual problem, says
    how far from the best the result can be. Raises ValueError if even the smallest settings are larger than the budget.
    """
    smallest = [min(choice.nbytes for choice in part) for part in parts]
    free = budget - sum(smallest)
    if free < 0:
        raise ValueError(f"the smallest settings take {sum(smallest)} bytes")
    unit, exact = _unit(parts, smallest, free, states)
    width = free // unit + 1
    best = np.zeros(width)
    taken = np.empty((len(parts), width), np.uint8)
    steps = [
        [_rounded(choice.nbytes - least, unit) for choice in part] for part, least in zip(parts, smallest, strict=True)
    ]
    for number, part in enumerate(parts):
        best = _extend(best, part, steps[number], taken[number])
    for place in reversed(range(width)):  # at 0 all are smallest, and fit
        chosen = _chosen(taken, steps, place)
        found = [part[index] for part, index in zip(parts, chosen, strict=True)]
        if sum(choice.nbytes for choice in found) <= budget:
            break
    cost = math.fsum(choice.cost for choice in found)
    bound = cost if exact else min(cost, _dual(parts, budget))
    return Selection(chosen, sum(choice.nbytes for choice in found), cost, bound)


def _rounded(nbytes: int, unit: int) -> int:
    """Return bytes in units, to the nearest; 0 of nothing only."""
    return max((2 * nbytes + unit) // (2 * unit), min(nbytes, 1))


def _chosen(taken: NDArray[np.uint8], steps: Sequence[Sequence[int]], place: int) -> list[int]:
    """Return the choices that lead to a size."""
    chosen = []
    for number in reversed(range(len(steps))):
        chosen.append(int(taken[number, place]))
        place -= steps[number][chosen[-1]]
    return chosen[::-1]


def _unit(parts: Sequence[Sequence[Option]], smallest: Sequence[int], free: int, states: int) -> tuple[int, bool]:
    """Return the bytes by which sizes are told apart, and whether no size is rounded for it."""
    apart = (choice.nbytes - least for part, least in zip(parts, smallest, strict=True) for choice in part)
    common = math.gcd(*apart) or 1
    unit = max(common, -(-free // states))
    return unit, unit == common


def _extend(
    best: NDArray[np.float64], part: Sequence[Option], steps: Sequence[int], taken: NDArray[np.uint8]
) -> NDArray[np.float64]:
    """Return the least cost at each size with one part more; ``taken`` becomes the choice that has it."""
    found = np.full(len(best), np.inf)
    for index, (choice, step) in enumerate(zip(part, steps, strict=True)):
        if step < len(best):
            cost = np.full(len(best), np.inf)
            cost[step:] = best[: len(best) - step] + choice.cost
            better = cost < found
            found[better], taken[better] = cost[better], index
    return found


def _dual(parts: Sequence[Sequence[Option]], budget: int) -> float:
    """Return the largest lower bound that a price on bytes proves: the Lagrangian dual, which is concave."""

    def value(price: float) -> tuple[float, int]:
        cheapest = [
            min(part, key=lambda choice: (choice.cost + price * choice.nbytes, choice.nbytes)) for part in parts
        ]
        nbytes = sum(choice.nbytes for choice in cheapest)
        return math.fsum(choice.cost for choice in cheapest) + price * (nbytes - budget), nbytes

    low, high = 0.0, 1e-30
    while value(high)[1] > budget and high < 1e30:
        high *= 2
    found = max(value(low)[0], value(high)[0])
    for _ in range(100):
        middle = (low + high) / 2
        bound, nbytes = value(middle)
        found = max(found, bound)
        low, high = (middle, high) if nbytes > budget else (low, middle)
    return found
