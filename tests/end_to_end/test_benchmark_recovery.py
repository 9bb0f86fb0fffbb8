"""``benchmarks/recovery.py`` at work on a tiny model."""

from __future__ import annotations

import json
import random
import re
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).resolve().parents[2] / "benchmarks" / "recovery.py"
WORDS = "the a small model text learns to read and write of in for with many few layers heads".split()
pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800)]


def benchmark(*words: object) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, str(SCRIPT), *map(str, words)], capture_output=True, text=True)


def write_text(path: Path, paragraphs: int, seed: int) -> Path:
    """Sentences of random words: something to learn."""
    draw = random.Random(seed)
    path.write_text("\n\n".join(" ".join(draw.choices(WORDS, k=30)) + "." for _ in range(paragraphs)))
    return path


@pytest.mark.parametrize("dtype, apart", [("fp32", 1e-4), ("bf16", 2e-2)])
def test_both_trainers_do_the_same_work(tiny, tmp_path, dtype, apart):
    sizes = ["--seq-length", 32, "--batch", 2, "--accumulate", 2, "--steps", 2, "--rounds", 2]
    done = benchmark("speed", tiny("llama"), *sizes, "--dtype", dtype, "--output", tmp_path / "speed.json")
    assert done.returncode == 0, done.stderr
    ours, theirs = json.loads((tmp_path / "speed.json").read_text())["measured"].values()
    assert len(ours) == len(theirs) == 2
    for one, other in zip(ours, theirs):
        for loss in ("first_loss", "mean_loss"):  # after updates too: the optimizers agree
            assert one[loss] == pytest.approx(other[loss], abs=apart)
        for each in (one, other):
            assert each["tokens_per_second"] == pytest.approx(2 * 2 * 2 * 32 / each["seconds"]) and each["seconds"] > 0
            assert each["peak_memory"] > 1e7
    ratios = sorted(one["tokens_per_second"] / other["tokens_per_second"] for one, other in zip(ours, theirs))
    said = re.search(r"megatron-prune / transformers.Trainer: (\S+) \((\S+) to (\S+)\)", done.stdout)
    assert [float(word) for word in said.groups()[1:]] == pytest.approx(ratios, abs=0.01)
    assert float(said[1]) == pytest.approx(sum(ratios) / 2, abs=0.01)


def test_what_does_not_fit_the_model_is_refused(tiny):
    done = benchmark("speed", tiny("llama"), "--seq-length", 65)
    assert done.returncode == 1 and "2 to 64" in done.stderr and "Traceback" not in done.stderr


def test_all_arms_are_trained_once_and_told_of(tiny, tmp_path):
    texts = ["--train", write_text(tmp_path / "train.txt", 100, 0), "--held-out", write_text(tmp_path / "held.txt", 30, 1)]
    sizes = ["--tokens", 5100, "--seq-length", 32, "--global-batch-size", 8, "--eval-iters", 2, "--nsamples", 8]
    rates = ["--lr", 3e-3, "--lr-random", 2e-3, "--lr-lora", 4e-3, "--lora-r", 4, "--lora-alpha", 8]
    words = ["curve", tiny("llama"), *texts, *sizes, *rates, "--out", tmp_path / "out"]
    done = benchmark(*words, "--", "--prune_type", "global")
    assert done.returncode == 0, done.stderr
    found = json.loads((tmp_path / "out" / "curves.json").read_text())
    arms = found["arms"]
    assert {arm: one["lr"] for arm, one in arms.items()} == {"pruned": 3e-3, "random": 2e-3, "lora": 4e-3, "distilled": 3e-3}
    for arm, one in arms.items():
        curve = one["held_out"]
        assert [tokens for tokens, _ in curve] == [256 * step for step in range(21)]  # 20 steps, the start, nothing twice
        assert (curve[0][1], curve[-1][1]) == (one["start_loss"], one["final_loss"]) and one["tokens"] == 20 * 256
        assert one["best_loss"] == min(loss for _, loss in curve) and one["tokens_per_second"] > 0
        assert arm == "distilled" or one["final_loss"] < one["start_loss"] - 0.1  # a teacher that knows nothing
    assert arms["pruned"]["start_loss"] == arms["lora"]["start_loss"] == arms["distilled"]["start_loss"]
    assert len({arms["pruned"]["start_loss"], arms["random"]["start_loss"], found["dense_loss"]}) == 3
    assert all(4 < loss < 9 for loss in (arms["pruned"]["start_loss"], arms["random"]["start_loss"], found["dense_loss"]))
    reached = next((tokens for tokens, loss in arms["pruned"]["held_out"] if loss <= arms["random"]["final_loss"]), None)
    assert found["reached"]["tokens"] == reached and found["reached"]["share"] == (reached and reached / 5120)
    assert found["distillation"] == {"plain": arms["pruned"]["final_loss"], "distilled": arms["distilled"]["final_loss"]}
    assert (tmp_path / "out" / "curves.png").read_bytes().startswith(b"\x89PNG")
    for text in ("5,120", "unpruned model", f"{arms['random']['final_loss']:.4f}", "claim: at most 10%"):
        assert text in done.stdout

    logs = {path: path.stat().st_mtime_ns for path in (tmp_path / "out").glob("*.log")}
    again = benchmark(*words, "--", "--prune_type", "global")
    assert again.returncode == 0 and logs == {path: path.stat().st_mtime_ns for path in (tmp_path / "out").glob("*.log")}
    assert json.loads((tmp_path / "out" / "curves.json").read_text()) == found
    other = benchmark(*words, "--lr-random", 1e-3, "--", "--prune_type", "global")
    assert other.returncode == 1 and "runs/random was made by another command" in other.stderr
