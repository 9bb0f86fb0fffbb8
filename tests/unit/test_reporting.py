"""How far long work is: lines where there is no terminal, a bar that reaches its end where there is one."""

from __future__ import annotations

import io
import logging
import re

import pytest

from megatron_prune.runtime import reporting
from megatron_prune.runtime.reporting import log, print_table, progress_bar, shown_bytes, shown_memory, shown_time


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
    """Of files decimal, of memory binary; a unit is never said 1000 (1024, 60, 24) times."""
    assert [shown_bytes(count) for count in (0, 999, 1000, 2_500_000, 7e12)] == ["0 B", "999 B", "1.0 KB", "2.5 MB", "7.0 TB"]
    assert [shown_bytes(count) for count in (999.7, 999_960, 5e15)] == ["1.0 KB", "1.0 MB", "5000.0 TB"]
    amounts = [shown_memory(count) for count in (0, 1023, 1 << 10, 5 << 19, (1 << 30) - 1, 80 << 30, 3 << 39)]
    assert amounts == ["0 B", "1023 B", "1.0 KiB", "2.5 MiB", "1.0 GiB", "80.0 GiB", "1.5 TiB"]
    times = {
        **{0.04: "0.0 s", 59: "59.0 s", 59.97: "1 min 00 s", 61: "1 min 01 s", 3599.6: "1 h 00 min", 7325: "2 h 02 min"},
        **{86399: "23 h 59 min", 86400: "1 d 0 h", 273_700: "3 d 4 h", 86400 * 400: "400 d 0 h"},
    }
    assert {seconds: shown_time(seconds) for seconds in times} == times


LONG = "a_name_without_blanks_that_is_much_longer_than_any_terminal_is_wide_" * 2


@pytest.mark.parametrize("columns", ["40", "80", None])
def test_a_table_loses_no_letter_however_narrow_the_place_is(columns, capsys, monkeypatch):
    from rich.table import Table

    monkeypatch.delenv("COLUMNS", raising=False)
    if columns:
        monkeypatch.setenv("COLUMNS", columns)
    table = Table("step", "time")
    table.add_row(LONG, "3 d 4 h")
    print_table(table)
    lines = capsys.readouterr().out.splitlines()
    cells = [line.strip("│").split("│")[0].strip() for line in lines if line.startswith("│")]
    assert "".join(cells) == LONG and any("3 d 4 h" in line for line in lines)
    assert columns is None or max(map(len, lines)) <= int(columns)
    assert columns is not None or len(cells) == 1
