"""What a run says on standard error: the log, and how far long work is.

On a terminal that is a bar. Elsewhere (a file, Slurm's log, ``tee``) it is a line every :data:`EVERY` seconds.
"""

from __future__ import annotations

import contextlib
import logging
import os
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.table import Table

log = logging.getLogger("megatron_prune")

EVERY = 30.0
"""Seconds between lines where there is no terminal."""

WIDEST = 10_000
"""Columns of a table where there is no terminal."""


@contextlib.contextmanager
def progress_bar(label: str, total: int, *, shown: bool, unit: str = "bytes") -> Iterator[Callable[[int], None]]:
    """How far work is, on standard error and on one process; it counts bytes, or what ``unit`` says."""
    if not shown or not log.isEnabledFor(logging.INFO):
        yield lambda count: None
    elif sys.stderr.isatty():
        with _bar(label, total, unit) as advance:
            yield _seen(label, total, advance)
    else:
        yield _seen(label, total, _Lines(label, total, unit))


Watcher = Callable[[str, int, int], None]
"""Called with the label of some work, how much of it is done, and its whole."""

_WATCHERS: list[Watcher] = []


@contextlib.contextmanager
def watched(watcher: Watcher) -> Iterator[None]:
    """Tell ``watcher`` of all progress that is shown."""
    _WATCHERS.append(watcher)
    try:
        yield
    finally:
        _WATCHERS.remove(watcher)


def _seen(label: str, total: int, advance: Callable[[int], None]) -> Callable[[int], None]:
    """``advance`` for watchers too."""
    done = 0

    def advanced(count: int) -> None:
        nonlocal done
        done += count
        advance(count)
        for watcher in _WATCHERS:
            watcher(label, done, total)

    for watcher in _WATCHERS:
        watcher(label, 0, total)
    return advanced


@contextlib.contextmanager
def _bar(label: str, total: int, unit: str) -> Iterator[Callable[[int], None]]:
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

    amount = (DownloadColumn(),) if unit == "bytes" else (MofNCompleteColumn(), TextColumn(unit))
    columns = (TextColumn("{task.description}"), BarColumn(), *amount, TimeElapsedColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True)) as bar:
        task = bar.add_task(label, total=total)
        yield lambda count: bar.advance(task, count)
        bar.update(task, completed=total)  # work that ended is done, whatever was skipped in it


class _Lines:
    """Called with what was done since; says so now and then, never for work that is over before the first line."""

    def __init__(self, label: str, total: int, unit: str):
        self._label, self._total, self._unit = label, total, unit
        self._done, self._start = 0, time.monotonic()
        self._said = self._start

    def __call__(self, count: int) -> None:
        self._done += count
        now = time.monotonic()
        if now - self._said < EVERY or not self._total:
            return
        self._said, passed = now, now - self._start
        done, total = min(self._done, self._total), self._total
        amount = f"{shown_bytes(done)} of {shown_bytes(total)}" if self._unit == "bytes" else f"{done} of {total} {self._unit}"
        left = f", about {shown_time(passed * (total - done) / done)} left" if done else ""
        log.info("%s: %s, %s%s", self._label, amount, shown_time(passed), left)


def shown_bytes(count: float) -> str:
    """Bytes of files and of what is read, in words: decimal (a GB is 1000³ bytes), as disks and hubs say them."""
    return _scaled(count, 1000, ("B", "KB", "MB", "GB", "TB"))


def shown_memory(count: float) -> str:
    """Bytes of memory in words: binary (a GiB is 1024³ bytes), as drivers and schedulers say it."""
    return _scaled(count, 1024, ("B", "KiB", "MiB", "GiB", "TiB"))


def _scaled(count: float, step: int, units: tuple[str, ...]) -> str:
    power = 0
    while power < len(units) - 1 and (round(count) if power == 0 else round(count, 1)) >= step:
        count, power = count / step, power + 1
    return f"{count:.0f} {units[0]}" if power == 0 else f"{count:.1f} {units[power]}"


def shown_time(seconds: float) -> str:
    """A duration in words, in its two largest units: ``5.0 s``, ``1 min 01 s``, ``2 h 02 min``, ``3 d 4 h``."""
    if seconds < 59.95:
        return f"{seconds:.1f} s"
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours >= 24:
        return f"{hours // 24} d {hours % 24} h"
    return f"{hours} h {minutes:02} min" if hours else f"{minutes} min {seconds:02} s"


@contextlib.contextmanager
def no_bars() -> Iterator[None]:
    """Without the progress bars of transformers; whoever had them has them again."""
    from transformers.utils import logging

    shown_before = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown_before:
            logging.enable_progress_bar()


def print_table(table: Table) -> None:
    """Print a table: as wide as the terminal, words that do not fit folded; where there is none, as wide as it is."""
    from rich.console import Console

    for column in table.columns:
        column.overflow = "fold"
    known = sys.stdout.isatty() or "COLUMNS" in os.environ
    Console(width=None if known else WIDEST).print(table)


def quiet_libraries() -> None:
    """Leave out what libraries say about what is not installed, here and in processes that are spawned."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    warnings.filterwarnings("ignore", module=r"(megatron\.core|torch\.distributed|torch\.nn\.parallel|torch\.cuda)")
    warnings.filterwarnings(
        "ignore", message=r".*(Apex|Transformer Engine|transformer_engine|barrier\(\)|not a leaf Tensor|CUDA).*"
    )
    os.environ.setdefault("PYTHONWARNINGS", "ignore:Apex is not,ignore:Transformer Engine and Apex")
