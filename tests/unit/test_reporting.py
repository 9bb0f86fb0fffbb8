"""How far long work is: lines where there is no terminal, a bar that reaches its end where there is one."""

from __future__ import annotations

import io
import logging
import re

import pytest

from megatron_prune.runtime import reporting
from megatron_prune.runtime.reporting import log, progress_bar, shown_bytes, shown_time


class Clock:
    """One that goes on when it is told to."""

    def __init__(self):
        self.now = 100.0

    def monotonic(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(reporting, "time", clock)
    return clock


@pytest.fixture
def said(caplog, monkeypatch):
    monkeypatch.setattr(log, "propagate", True)
    caplog.set_level(logging.INFO, log.name)
    return lambda: [record.getMessage() for record in caplog.records]


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_lines_come_every_so_often_with_what_is_done_and_how_long_it_will_take(clock, said, monkeypatch):
    monkeypatch.setattr("sys.stderr", io.StringIO())
    with progress_bar("re-fitting", 30, shown=True, unit="layers") as advance:
        for _ in range(30):
            clock.now += 10.0
            advance(1)
    lines = said()
    assert lines[0] == "re-fitting: 3 of 30 layers, 30.0 s, about 4 min 30 s left" and len(lines) == 10
    assert lines[-1] == "re-fitting: 30 of 30 layers, 5 min 00 s, about 0.0 s left"
    with progress_bar("reading", 4_000_000, shown=True) as advance:
        clock.now += 31.0
        advance(1_000_000)
    assert said()[-1] == "reading: 1.0 MB of 4.0 MB, 31.0 s, about 1 min 33 s left"


def test_short_work_no_main_process_and_quiet_say_nothing(clock, said, monkeypatch, caplog):
    monkeypatch.setattr("sys.stderr", io.StringIO())
    with progress_bar("short", 3, shown=True) as advance:
        clock.now += 29.0
        advance(3)
    with progress_bar("elsewhere", 3, shown=False) as advance:
        clock.now += 99.0
        advance(1)
    caplog.set_level(logging.WARNING, log.name)
    with progress_bar("quiet", 3, shown=True) as advance:
        clock.now += 99.0
        advance(1)
    assert said() == []


def test_a_bar_reaches_its_end_where_part_of_the_work_was_not_needed(said, monkeypatch):
    terminal = Terminal()
    monkeypatch.setattr("sys.stderr", terminal)
    monkeypatch.setenv("TERM", "xterm")
    with progress_bar("fitting", 8, shown=True, unit="layers") as advance:
        advance(3)
    assert re.findall(r"(\d+)/8", terminal.getvalue())[-1] == "8"
    with pytest.raises(ZeroDivisionError), progress_bar("fitting", 8, shown=True, unit="layers") as advance:
        advance(3)
        raise ZeroDivisionError
    assert re.findall(r"(\d+)/8", terminal.getvalue())[-1] == "3", "and stays where work broke off"


def test_sizes_and_times_in_words():
    assert [shown_bytes(count) for count in (0, 999, 1000, 2_500_000, 7e12)] == ["0 B", "999 B", "1.0 KB", "2.5 MB", "7.0 TB"]
    assert [shown_time(seconds) for seconds in (0.04, 59, 61, 3599.6, 7325)] == [
        "0.0 s",
        "59.0 s",
        "1 min 01 s",
        "1 h 00 min",
        "2 h 02 min",
    ]
