"""Processes that work through a corpus: a few items in memory at a time, results in the order of the items."""

from __future__ import annotations

import multiprocessing
import multiprocessing.context
import os
import signal
import sys
import threading
import types
from collections import deque
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from typing import Any, Callable, Iterable, Iterator, TypeVar

from megatron_prune.errors import InputError, PruneError

T, R = TypeVar("T"), TypeVar("R")


def cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


MOST = 1024
"""Processes."""


def check_workers(workers: int | None) -> None:
    """Refuse a number of processes that is none.

    Raises:
        InputError: naming the flag.
    """
    if workers is not None and not 1 <= workers <= MOST:
        raise InputError("--workers", got=workers, needed=f"a positive number, at most {MOST}")


def in_processes(
    items: Iterable[T], work: Callable[[T], R], *, workers: int, begin: Callable[..., None], given: tuple[Any, ...]
) -> Iterator[R]:
    """``work`` of every item, in order. Items that are at work when the iteration is left are finished.

    Args:
        begin: called with ``given`` once in every process.

    Raises:
        PruneError: if a process was ended from outside.
    """
    waiting: deque = deque()
    with ProcessPoolExecutor(workers, mp_context=_processes(), initializer=_begin, initargs=(begin, given)) as pool:
        try:
            for item in items:
                waiting.append(pool.submit(work, item))
                if len(waiting) > workers + 1:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        except BrokenProcessPool:
            raise PruneError("a worker was ended from outside, perhaps for want of memory; try fewer --workers") from None
        finally:
            pool.shutdown(cancel_futures=True)


class _Process(multiprocessing.context.ForkServerProcess):
    """A process that does not run the caller's script again: what it works with are functions of this project.

    The standard library imports it into every process, so that a script without ``if __name__ == "__main__":`` would start its
    work anew in each.
    """

    @staticmethod
    def _Popen(process: Any) -> Any:
        script = sys.modules["__main__"]
        sys.modules["__main__"] = types.ModuleType("__main__")
        try:
            return multiprocessing.context.ForkServerProcess._Popen(process)
        finally:
            sys.modules["__main__"] = script


class _Context(multiprocessing.context.ForkServerContext):
    Process = _Process


def _processes() -> Any:
    """Processes that start clean (threads of this one are not copied) and with the slow imports done, once for all."""
    context = _Context()
    context.set_forkserver_preload([__name__, "megatron_prune.text.parts", "transformers.tokenization_utils_tokenizers"])
    return context


def _begin(begin: Callable[..., None], given: tuple[Any, ...]) -> None:
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # the processes are what is parallel
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the main process, which lets what runs be finished
    threading.Thread(target=_end_with_parent, daemon=True).start()
    begin(*given)


def _end_with_parent() -> None:
    multiprocessing.parent_process().join()
    os._exit(1)
