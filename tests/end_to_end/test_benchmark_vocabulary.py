"""``benchmarks/vocabulary.py`` at work on small tokenizers."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from tiny import build_tiny
from tokenizer_kinds import byte_level, llama2, text

SCRIPT = Path(__file__).resolve().parents[2] / "benchmarks" / "vocabulary.py"
pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]


def benchmark(*words: object) -> str:
    done = subprocess.run([sys.executable, str(SCRIPT), *map(str, words)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_ours_reaches_every_kept_token_and_a_plain_cut_does_not(tmp_path):
    (tmp_path / "text.txt").write_text(text(), encoding="utf-8")
    found = benchmark(
        "lengths", llama2(tmp_path / "t"), "--count", tmp_path / "text.txt", "--held-out", tmp_path / "text.txt", "--sizes", 480
    )
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in found.splitlines() if line.startswith("| 480")]
    assert [row[1] for row in rows] == ["frequency", "ours"]
    assert int(rows[0][4]) > 0 == int(rows[1][4]) and float(rows[1][2]) < float(rows[0][2])


def test_bits_speed_and_memory_of_a_tiny_model(tmp_path):
    (tmp_path / "text.txt").write_text(text(), encoding="utf-8")
    model = build_tiny(tmp_path / "m", vocab_size=700, dtype="float32", max_position_embeddings=512)
    byte_level(model)
    files = ["--count", tmp_path / "text.txt", "--held-out", tmp_path / "text.txt"]
    assert "ours, folded" in benchmark("bits", model, *files, "--sizes", 480, "--paragraphs", 3, "--fold", "--nsamples", 2)
    assert "counting / alone" in benchmark("speed", model, *files, "--rounds", 1)
    assert "in largest tensors" in benchmark("memory", model, "--size", 480)
