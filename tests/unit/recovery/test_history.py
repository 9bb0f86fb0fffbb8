"""What a run told of itself, read again."""

from __future__ import annotations

import pytest

from megatron_prune.errors import InputError
from megatron_prune.recovery.history import draw_losses, read_history

GOOD = '{"iteration": 1, "tokens": 64, "loss": 2.5, "mfu": null}\n{"iteration": 2, "tokens": 128, "held_out_loss": NaN}\n'


def test_records_are_read_and_drawn_without_a_line_that_was_cut_off(tmp_path):
    (tmp_path / "history.jsonl").write_text(GOOD + '{"iteration": 3, "tok')
    records = read_history(tmp_path / "history.jsonl")
    assert [record["tokens"] for record in records] == [64, 128] and records[0]["loss"] == 2.5
    draw_losses({"": records}, tmp_path / "loss.png")
    assert (tmp_path / "loss.png").read_bytes().startswith(b"\x89PNG") and read_history(tmp_path / "nothing") == []


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ('{"iteration": -1, "tokens": 1}', "needed: iteration and tokens"),
        ('{"iteration": 1, "tokens": 1' + "0" * 400 + "}", "needed: iteration and tokens"),
        ('{"iteration": 1, "tokens": 1.0}', "needed: iteration and tokens"),
        ('{"iteration": 1, "tokens": 1, "loss": 1e308}', "numbers up to 1e\\+100"),
        ('{"iteration": 1, "tokens": 1, "loss": 1' + "0" * 400 + "}", "numbers up to 1e\\+100"),
        ('{"iteration": 1, "tokens": 1, "loss": "x"}', "line 1: loss"),
    ],
)
def test_numbers_that_cannot_be_are_refused_by_their_line(tmp_path, line, said):
    (tmp_path / "history.jsonl").write_text(line + "\n" + GOOD)
    with pytest.raises(InputError, match=f"(?s)history.jsonl, line 1.*{said}|{said}"):
        read_history(tmp_path / "history.jsonl")
