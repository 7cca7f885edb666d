"""What other sizes would cost: the expected divergence of the best recipes from the smallest bundle to 8 bit."""

import math
from dataclasses import replace

from ..convert.bundle.plan import Inventory
from .allocation import AllocationRequest, Budget, best_recipe, smallest_plan
from .sensitivity import Sensitivities

_POINTS = 6


def size_curve(
    inventory: Inventory, request: AllocationRequest, sensitivities: Sensitivities
) -> list[tuple[int, float]]:
    """Return bytes and expected divergence, in nats/token, of the best recipes for some sizes, smallest first."""
    smallest = smallest_plan(inventory, request)
    room = max(1, int(smallest.parameters * (8 - smallest.bits_per_weight) / 8))
    sizes = [smallest.nbytes + room * step // _POINTS for step in range(_POINTS + 1)]
    best = [best_recipe(inventory, replace(request, budget=Budget(nbytes)), sensitivities) for nbytes in sizes]
    return [(one.nbytes, math.fsum(one.expected.values())) for one in best]
