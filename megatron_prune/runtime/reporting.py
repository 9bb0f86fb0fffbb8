"""What a run says on standard error: the log, and bars."""

from __future__ import annotations

import contextlib
import logging
from typing import Callable, Iterator

from rich.console import Console
from rich.progress import (
    BarColumn,
    DownloadColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

log = logging.getLogger("megatron_prune")


@contextlib.contextmanager
def progress_bar(label: str, total: int, *, shown: bool, unit: str = "bytes") -> Iterator[Callable[[int], None]]:
    """A bar on standard error, on one process; it counts bytes, or what ``unit`` says."""
    amount = (DownloadColumn(),) if unit == "bytes" else (MofNCompleteColumn(), TextColumn(unit))
    columns = (TextColumn("{task.description}"), BarColumn(), *amount, TimeElapsedColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True), disable=not shown) as bar:
        task = bar.add_task(label, total=total)
        yield lambda count: bar.advance(task, count)
