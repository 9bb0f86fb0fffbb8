"""The process that writes a rank's files of a checkpoint while training goes on.

megatron-core would start further processes below it and wait for them without looking whether they live: one that the system
kills ended such a run never. Here the process writes its files itself, in threads, and its exit code tells how it ended.
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
import os
import pickle
import queue
import signal
from concurrent.futures import ThreadPoolExecutor
from multiprocessing.process import BaseProcess
from typing import Any

from megatron.core.dist_checkpointing.strategies.filesystem_async import FileSystemWriterAsync

_PR_SET_PDEATHSIG = 1


class Report:
    """What a writer hands back, through memory that it shares with the process it was forked from."""

    def __init__(self) -> None:
        self._memory = os.fdopen(os.memfd_create("report"), "w+b")

    def put(self, value: Any) -> None:
        """Called by the writer, once."""
        pickle.dump(value, self._memory)
        self._memory.flush()

    def get_nowait(self) -> Any:
        """The value, if there is one; the memory is then free for the next writer.

        Raises:
            queue.Empty: if the writer did not come to its report.
        """
        self._memory.seek(0)
        data = self._memory.read()
        self._memory.seek(0)
        self._memory.truncate()
        if not data:
            raise queue.Empty
        return pickle.loads(data)  # of this program's own process, by way of memory alone


def write(transforms: list, rank: int, buckets: list, report: Report) -> None:
    """Write every file of this rank, in the writer; in place of megatron-core's ``write_preloaded_data_multiproc``.

    Args:
        transforms, buckets: as megatron-core hands them to that.
    """
    _live_with_parent()
    gc.disable()  # as megatron-core does: objects of the parent's must not be collected here
    found, counted = queue.Queue(), queue.Queue()

    def one(number: int) -> None:
        counted.put(number)
        FileSystemWriterAsync.write_preloaded_data(transforms, number, buckets[number], found, counted, True)

    try:
        with ThreadPoolExecutor(len(buckets)) as threads:
            list(threads.map(one, range(len(buckets))))
        results = dict(found.get_nowait() for _ in buckets)
        failed = [result for result in results.values() if isinstance(result, Exception)]
        report.put(failed[0] if failed else results)
    except Exception as error:
        report.put(RuntimeError(f"{type(error).__name__}: {error}"))


def ending(process: BaseProcess | None) -> str | None:
    """How a writer ended, in words; ``None`` if it ended well, or there was nothing to write."""
    code = process.exitcode if process else 0
    if not code:
        return None
    if code > 0:
        return f"process {process.pid}, which writes it, ended with exit code {code}"
    name = signal.Signals(-code).name if -code in list(signal.Signals) else f"signal {-code}"
    hint = "; where nobody did that, the system ran out of memory" if name == "SIGKILL" else ""
    return f"process {process.pid}, which writes it, was ended by {name}{hint}"


def _live_with_parent() -> None:
    """Leave a request to stop to the parent (torchrun signals it to all); end with the parent, however it ends (Linux)."""
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
