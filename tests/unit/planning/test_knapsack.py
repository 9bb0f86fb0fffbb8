"""One option for every item: as good as trying all of them."""

from __future__ import annotations

from itertools import product

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from megatron_prune.planning.knapsack import choose

ITEMS = st.lists(st.lists(st.tuples(st.integers(0, 60), st.integers(0, 40)), min_size=1, max_size=4), min_size=1, max_size=5)


def tables(items: list[list[tuple[int, int]]], unit: int = 1) -> tuple[list[np.ndarray], list[np.ndarray]]:
    costs = [np.array([cost * unit for cost, _ in options], dtype=np.int64) for options in items]
    return costs, [np.array([loss / 8 for _, loss in options]) for options in items]


def total(tables: list[np.ndarray], chosen) -> float:
    return sum(table[option] for table, option in zip(tables, chosen))


def exhaustive(costs: list[np.ndarray], losses: list[np.ndarray], limit: int) -> float | None:
    """The least loss within a limit, found by trying everything."""
    every = product(*(range(len(each)) for each in costs))
    return min((total(losses, chosen) for chosen in every if total(costs, chosen) <= limit), default=None)


@given(ITEMS, st.integers(0, 200), st.sampled_from([1, 7, 576]))
def test_the_least_loss_within_the_limit(items, limit, unit):
    costs, losses = tables(items, unit)
    chosen, best = choose(costs, losses, limit * unit), exhaustive(costs, losses, limit * unit)
    if best is None:
        assert chosen is None
    else:
        assert total(costs, chosen) <= limit * unit and total(losses, chosen) == best


@given(ITEMS, st.integers(0, 200), st.integers(1, 9))
def test_of_few_buckets_the_limit_is_kept_and_the_loss_is_that_of_rounded_costs_at_most(items, limit, buckets):
    costs, losses = tables(items)
    chosen = choose(costs, losses, limit, buckets)
    least = sum(int(each.min()) for each in costs)
    if least > limit:
        assert chosen is None
        return
    assert total(costs, chosen) <= limit
    unit = max(1, -(-(limit - least) // buckets))
    rounded = [-(-(each - each.min()) // unit) for each in costs]
    assert total(losses, chosen) <= exhaustive(rounded, losses, (limit - least) // unit)


@given(ITEMS, st.integers(0, 200), st.integers(1, 9))
def test_no_exchange_of_one_option_for_another_gains_and_fits(items, limit, buckets):
    costs, losses = tables(items)
    chosen = choose(costs, losses, limit, buckets)
    for item, options in enumerate(costs) if chosen else ():
        for option in range(len(options)):
            other = [*chosen[:item], option, *chosen[item + 1 :]]
            assert total(losses, other) >= total(losses, chosen) or total(costs, other) > limit
