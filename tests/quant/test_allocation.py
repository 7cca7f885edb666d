"""Allocation of bytes: against every combination, and its bound."""

from collections.abc import Sequence
from itertools import product

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from ppx.quant.allocation import Option, allocate_bits

SUBLAYERS = st.lists(
    st.lists(st.builds(Option, st.integers(1, 60), st.floats(0, 10)), min_size=1, max_size=4), min_size=1, max_size=5
)


def by_trying_all(parts: Sequence[Sequence[Option]], budget: int) -> float | None:
    return min(
        (
            sum(choice.cost for choice in combination)
            for combination in product(*parts)
            if sum(choice.nbytes for choice in combination) <= budget
        ),
        default=None,
    )


@given(SUBLAYERS, st.integers(5, 200))
@settings(max_examples=300, deadline=None)
def test_it_is_the_best_of_all_combinations(parts, budget):
    best = by_trying_all(parts, budget)
    if best is None:
        with pytest.raises(ValueError, match="smallest settings take"):
            allocate_bits(parts, budget)
        return
    found = allocate_bits(parts, budget)
    assert found.cost == pytest.approx(best)
    assert found.bound == found.cost
    assert found.nbytes <= budget
    assert found.cost == pytest.approx(sum(part[index].cost for part, index in zip(parts, found.chosen, strict=True)))


@given(SUBLAYERS, st.integers(5, 200))
@settings(max_examples=300, deadline=None)
def test_with_sizes_rounded_the_budget_and_the_bound_hold(parts, budget):
    best = by_trying_all(parts, budget)
    if best is None:
        return
    found = allocate_bits(parts, budget, states=7)
    assert found.nbytes <= budget
    assert found.bound <= best + 1e-9
    assert best <= found.cost + 1e-9


def test_at_the_size_of_a_large_model_it_is_near_the_bound():
    random = np.random.default_rng(0)
    parts = []
    for _ in range(250):
        weights, power = int(random.integers(1, 130) * 2**20 + random.integers(0, 4096)), random.lognormal()
        parts.append([Option(int(weights * (bits + 0.5) // 8), power * 4.0**-bits) for bits in (2, 3, 4, 5, 6, 8)])
    budget = sum(part[2].nbytes for part in parts)
    found = allocate_bits(parts, budget)
    same = sum(part[2].cost for part in parts)
    assert found.cost < same
    assert found.bound <= found.cost < 1.001 * found.bound
