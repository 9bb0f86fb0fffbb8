"""The process through which writers of checkpoints report.

Beside this module it imports nothing heavy, and a run waits 0.1 s for it; it imports torch while the first report is read.
"""

from __future__ import annotations

import contextlib
import ctypes
import multiprocessing
import signal
from multiprocessing.managers import SyncManager
from typing import Any

_PR_SET_PDEATHSIG = 1


def report_queue() -> Any:
    """A queue in a process of its own, which outlives a request to stop: torchrun signals that to all processes."""
    manager = SyncManager(ctx=multiprocessing.get_context("spawn"))
    manager.start(initializer=_live_with_parent)
    return manager.Queue()


def _live_with_parent() -> None:
    """Leave a request to stop to the parent; end with the parent, however it ends (Linux)."""
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
