"""One option for every item, so that what is lost is least and the cost stays within a limit (the multiple-choice knapsack)."""

from __future__ import annotations

from math import gcd
from typing import Sequence

import numpy as np

BUCKETS = 1 << 17
"""Cells of the table. Where more costs are possible, those of options are rounded up to a share of the limit this fine."""


def choose(costs: Sequence[np.ndarray], losses: Sequence[np.ndarray], limit: int, buckets: int = BUCKETS) -> list[int] | None:
    """Dynamic programming over items and what is spent so far.

    Exact if all costs are multiples of at least ``1 / buckets`` of the limit. Else the choice is the best one of those that also
    stay within it with every cost rounded up; what rounding has left is spent on what then gains most.

    Args:
        costs: of every item's options, int64; any unit.
        losses: the same of what they lose, float64, finite.

    Returns:
        The number of the option of every item; ``None`` if even the cheapest ones cost more than ``limit``.
    """
    spare = limit - sum(int(each.min()) for each in costs)
    if spare < 0:
        return None
    extra = [each - each.min() for each in costs]
    exact = max(1, gcd(*(int(cost) for each in extra for cost in each)))
    unit = exact if spare // exact <= buckets else -(-spare // buckets)
    steps = [-(-each // unit) for each in extra]
    chosen = _best(steps, losses, spare // unit)
    return _topped_up(chosen, costs, losses, limit)


def _best(steps: list[np.ndarray], losses: Sequence[np.ndarray], size: int) -> list[int]:
    """The options that lose least for at most ``size`` steps.

    Args:
        steps: of every item's options, int64; the least of each item is 0.
    """
    least = np.zeros(size + 1)  # of the items so far, by the steps that they may take
    picks = []
    for step, loss in zip(steps, losses):
        new, pick = np.full(size + 1, np.inf), np.zeros(size + 1, dtype=np.int32)
        for option in _undominated(step, loss):
            begin = int(step[option])
            if begin <= size:
                found = least[: size + 1 - begin] + loss[option]
                better = found < new[begin:]
                new[begin:][better], pick[begin:][better] = found[better], option
        least = new
        picks.append(pick)
    chosen, left = [], size
    for step, pick in zip(reversed(steps), reversed(picks)):
        chosen.append(int(pick[left]))
        left -= int(step[chosen[-1]])
    return chosen[::-1]


def _undominated(step: np.ndarray, loss: np.ndarray) -> list[int]:
    """Options that lose less than all that cost no more, by cost."""
    kept: list[int] = []
    for option in np.lexsort((loss, step)):
        if not kept or loss[option] < loss[kept[-1]]:
            kept.append(int(option))
    return kept


def _topped_up(chosen: list[int], costs: Sequence[np.ndarray], losses: Sequence[np.ndarray], limit: int) -> list[int]:
    """The same with options exchanged, one after the other, for the one that gains most, as long as one fits and gains."""
    chosen = list(chosen)
    while True:
        spare = limit - sum(int(each[option]) for each, option in zip(costs, chosen))
        best = (0.0, 0, 0)
        for item, (cost, loss) in enumerate(zip(costs, losses)):
            gain = np.where(cost - cost[chosen[item]] <= spare, loss[chosen[item]] - loss, 0.0)
            best = max(best, (float(gain.max()), item, int(gain.argmax())))
        if best[0] <= 0.0:
            return chosen
        chosen[best[1]] = best[2]
