"""How long the passes of a pruning will take: their operations, as ``estimate`` counts them, at the rate that the second layer of
one of them has shown: the first counts as it was, since much is done once, and what is behind it may not be counted yet."""

from __future__ import annotations

import time
from typing import Callable, Mapping

from megatron_prune.runtime.reporting import log, shown_time

MEMORY_BOUND = frozenset({"sampling"})
"""Passes whose rate says nothing of others: they wait for memory."""


class Forecast:
    """A watcher of progress (:func:`megatron_prune.runtime.reporting.watched`).

    Args:
        planned: label of a pass → operations of a rank in all of it, in the order in which they run.
        layers: of the model: a pass has a rate once so large a part of it is done twice.
        say: given a line, once for each pass.
        clock: seconds.
    """

    def __init__(
        self,
        planned: Mapping[str, float],
        layers: int,
        say: Callable[[str], None] = log.info,
        clock: Callable[[], float] = time.monotonic,
    ):
        self._planned, self._layers, self._say, self._clock = dict(planned), layers, say, clock
        self._started: dict[str, float] = {}
        self._first: dict[str, tuple[float, int]] = {}
        self._said: set[str] = set()

    def __call__(self, label: str, done: int, total: int) -> None:
        """A pass has done so much of its whole."""
        now = self._clock()
        start = self._started.setdefault(label, now)
        if label not in self._planned or label in self._said or done * self._layers < total:
            return
        then, before = self._first.setdefault(label, (now, done))
        if (done - before) * self._layers < total or now <= then:
            return
        self._said.add(label)
        seconds = then - start + (now - then) * (total - before) / (done - before)
        line = f"{label}: about {shown_time(seconds)} in all, by how it begins"
        later = [name for name in self._planned if name not in self._started and name not in MEMORY_BOUND]
        if later and label not in MEMORY_BOUND and self._planned[label]:
            by_rate = lambda name: shown_time(seconds * self._planned[name] / self._planned[label])
            line += "; at its rate " + ", ".join(f"about {by_rate(name)} for {name}" for name in later)
        self._say(line)
