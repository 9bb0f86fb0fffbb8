"""The assertions of tests/distributed on one CUDA device. Run with: pytest -m gpu"""

from __future__ import annotations

import json
import subprocess
import sys

import numpy
import pytest
import torch

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


def verb(*arguments: str) -> None:
    subprocess.run([sys.executable, "-m", "megatron_prune", *arguments], check=True)


def test_logits_on_the_device_equal_transformers(tiny, family, tmp_path):
    source = str(tiny(family, dtype="float32"))
    verb("convert", "--load-dir", source, "--save-dir", str(tmp_path / "m"))
    verb("verify", "--load-dir", str(tmp_path / "m"), "--hf-dir", source, "--tolerance", "5e-3")


def test_bf16_perplexity_on_the_device_is_near_fp32(tiny, tmp_path):
    verb("convert", "--load-dir", str(tiny("llama")), "--save-dir", str(tmp_path / "m"))
    (tmp_path / "text").write_text("A small text for a small tokenizer. " * 100)
    values = []
    for dtype in ("fp32", "bf16"):
        output = tmp_path / f"{dtype}.json"
        run = ["--data", str(tmp_path / "text"), "--seq-length", "32", "--dtype", dtype, "--output", str(output)]
        verb("evaluate", "--load-dir", str(tmp_path / "m"), *run)
        values.append(json.loads(output.read_text())["perplexity"])
    assert values[1] == pytest.approx(values[0], rel=0.05)


def test_recovery_in_bf16_on_the_device_learns_and_goes_on(tiny, tmp_path):
    from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder

    builder = IndexedDatasetBuilder(str(tmp_path / "data.bin"), dtype=numpy.uint16)
    for _ in range(40):
        builder.add_item(torch.arange(64) % 7 + 5)
        builder.end_document()
    builder.finalize(str(tmp_path / "data.idx"))
    verb("convert", "--load-dir", str(tiny("llama")), "--save-dir", str(tmp_path / "m"))
    data = ["--data-path", str(tmp_path / "data"), "--split", "80,20,0", "--seq-length", "32", "--global-batch-size", "4"]
    run = [*data, "--bf16", "--lr", "1e-2", "--eval-iters", "2", "--save-interval", "10", "--teacher", str(tmp_path / "m")]
    run += ["--distill-weight", "0.1", "--train-iters", "20"]
    verb("recover", "--load", str(tmp_path / "m"), "--save", str(tmp_path / "run"), *run)
    summary = json.loads((tmp_path / "run/summary.json").read_text())
    assert summary["best_loss"] < 0.5 * summary["start_loss"]
    verb("recover", "--load", str(tmp_path / "m"), "--save", str(tmp_path / "run"), *run)  # ended: nothing more to do
    verb("export", "--load-dir", str(tmp_path / "run/best"), "--save-dir", str(tmp_path / "hf"))
