"""A pool of processes joined by gloo that runs one function on every rank, again and again.

Ranks are forked from a process that has imported what is slow to import, and stay up: keeping them costs nothing.
"""

from __future__ import annotations

import gc
import os
import socket
import traceback
from typing import Any, Callable

import torch.multiprocessing as mp
from tiny import FAMILIES

TIMEOUT_S = 240
PRELOAD = [
    "megatron_prune.recovery.launch",
    "megatron_prune.runtime.megatron_stage",
    "megatron_prune.steps.prune",
    *(f"transformers.models.{family}.modeling_{family}" for family in FAMILIES),
]


def forking_context():
    """Processes that begin with :data:`PRELOAD` imported, and with nothing else of this process."""
    context = mp.get_context("forkserver")
    context.set_forkserver_preload(PRELOAD)
    return context


class RankFailed(AssertionError):
    """A rank raised: its own traceback is the message, its exception's class name is in ``kinds``."""

    def __init__(self, errors: dict[int, tuple[str, str]]):
        self.kinds = {rank: kind for rank, (kind, _) in errors.items()}
        super().__init__("\n".join(f"--- rank {rank}\n{text}" for rank, (_, text) in sorted(errors.items())))


class RankPool:
    def __init__(self, size: int):
        context = forking_context()
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        self.size, self.alive = size, True
        self._calls = [context.SimpleQueue() for _ in range(size)]
        self._results = context.Queue()
        self._processes = [
            context.Process(target=_serve, args=(rank, size, port, self._calls[rank], self._results), daemon=True)
            for rank in range(size)
        ]
        for process in self._processes:
            process.start()

    def run(self, function: Callable, *args: Any, **kwargs: Any) -> list[Any]:
        """``function(world, *args, **kwargs)`` on every rank → results by rank.

        Raises:
            RankFailed: with every failing rank's traceback. The pool is gone if ranks were left in a collective.
        """
        for calls in self._calls:
            calls.put((function, args, kwargs))
        results, errors = [None] * self.size, {}
        for _ in range(self.size):
            try:
                rank, value, error = self._results.get(timeout=15 if errors else TIMEOUT_S)
            except Exception:
                self.close()
                raise RankFailed(errors or {-1: ("Timeout", "no rank answered")}) from None
            results[rank] = value
            if error:
                errors[rank] = error
        if errors:
            raise RankFailed(errors)
        return results

    def close(self) -> None:
        self.alive = False
        for process in self._processes:
            process.kill()


def _serve(rank: int, size: int, port: int, calls, results) -> None:
    os.environ.update(RANK=str(rank), WORLD_SIZE=str(size), LOCAL_RANK=str(rank), MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    import warnings

    warnings.filterwarnings("ignore")
    import torch

    torch.set_num_threads(1)
    from megatron_prune.runtime.world import World

    gc.freeze()  # megatron-core looks for garbage in every process that writes: not in what is imported
    world = World.of_environment()
    world.connect(always=True)
    while True:
        function, args, kwargs = calls.get()
        try:
            results.put((rank, function(world, *args, **kwargs), None))
        except BaseException as error:
            results.put((rank, None, (type(error).__name__, traceback.format_exc())))
