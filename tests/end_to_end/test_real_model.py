"""The real model of `make demo`, end to end. Needs the package index: run with `pytest -m slow`."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from megatron_prune.runtime.world import World
from megatron_prune.steps.convert import ConvertOptions, convert
from megatron_prune.steps.export import ExportOptions, export

ROOT = Path(__file__).resolve().parents[2]
pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800)]


@pytest.fixture(scope="module")
def real(tmp_path_factory):
    """SmolLM2-135M-Instruct and the demo's held-out text."""
    folder = tmp_path_factory.mktemp("real")
    subprocess.run([sys.executable, str(ROOT / "scripts/demo_model.py"), str(folder / "model")], check=True)
    texts = [str(folder / "calibration.txt"), str(folder / "held_out.txt")]
    subprocess.run([sys.executable, str(ROOT / "scripts/demo_text.py"), *texts], check=True)
    return folder


@pytest.mark.parametrize("tp, pp, ckpt_format", [(3, 1, "torch_dist"), (3, 2, "torch"), (1, 5, "torch_dist")])
def test_every_byte_of_the_real_model_returns(real, tmp_path, tp, pp, ckpt_format):
    options = ConvertOptions(
        load_dir=str(real / "model"),
        save_dir=str(tmp_path / "m"),
        target_tensor_parallel_size=tp,
        target_pipeline_parallel_size=pp,
        ckpt_format=ckpt_format,
    )
    convert(options, World())
    export(ExportOptions(load_dir=str(tmp_path / "m"), save_dir=str(tmp_path / "back")), World())
    names = sorted(file.name for file in (real / "model").iterdir())
    assert names == sorted(file.name for file in (tmp_path / "back").iterdir())
    for name in names:
        assert (real / "model" / name).read_bytes() == (tmp_path / "back" / name).read_bytes()


def test_perplexity_under_three_ranks_is_that_of_transformers(real, tmp_path):
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    convert(ConvertOptions(load_dir=str(real / "model"), save_dir=str(tmp_path / "m"), target_tensor_parallel_size=3), World())
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "3", "-m", "megatron_prune"]
    data = ["--data", str(real / "held_out.txt"), "--windows", "3", "--output", str(tmp_path / "e.json")]
    subprocess.run([*launch, "evaluate", "--load-dir", str(tmp_path / "m"), *data], check=True)
    tokenizer = AutoTokenizer.from_pretrained(real / "model")
    model = AutoModelForCausalLM.from_pretrained(real / "model", dtype=torch.float32).eval()
    tokens = torch.tensor(tokenizer((real / "held_out.txt").read_text())["input_ids"][: 3 * 512]).view(3, 512)
    with torch.no_grad():
        losses = [model(window[None], labels=window[None]).loss.item() for window in tokens]
    expected = torch.tensor(losses).mean().exp().item()
    assert json.loads((tmp_path / "e.json").read_text())["perplexity"] == pytest.approx(expected, rel=1e-4)
