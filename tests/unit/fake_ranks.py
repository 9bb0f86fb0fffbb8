"""Ranks without processes: what each would send is caught, then given to all."""

from __future__ import annotations

from typing import Callable

from megatron_prune.arch.sharding import ParallelLayout


class Captured(Exception):
    """Carries what one rank would have sent."""


class Rank:
    """A rank of a world without processes: first it tells what it sends, then it is given what all sent."""

    def __init__(self, rank: int, size: int, everything: list | None = None):
        self.rank, self.size, self.is_main = rank, size, rank == 0
        self._everything = everything

    def all_gather(self, value):
        if self._everything is None:
            raise Captured(value)
        return self._everything

    def agree(self, error: Exception | None) -> None:
        """One rank's error is raised; the others of these tests have the same."""
        if error is not None:
            raise error


def on_every_rank(run: Callable[[Rank], object], layout: ParallelLayout, copies: int = 1) -> list:
    """What ``run`` returns on every rank of TP × PP × ``copies``; it may exchange once."""
    size, sent = layout.tensor * layout.pipeline * copies, []
    for rank in range(size):
        try:
            return [run(Rank(rank, size))] * size
        except Captured as message:
            sent.append(message.args[0])
    return [run(Rank(rank, size, sent)) for rank in range(size)]
