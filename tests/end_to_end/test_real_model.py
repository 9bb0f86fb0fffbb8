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
        load=str(real / "model"),
        save=str(tmp_path / "m"),
        target_tensor_parallel_size=tp,
        target_pipeline_parallel_size=pp,
        ckpt_format=ckpt_format,
    )
    convert(options, World())
    export(ExportOptions(load=str(tmp_path / "m"), save=str(tmp_path / "back")), World())
    names = sorted(file.name for file in (real / "model").iterdir())
    assert names == sorted(file.name for file in (tmp_path / "back").iterdir())
    for name in names:
        assert (real / "model" / name).read_bytes() == (tmp_path / "back" / name).read_bytes()


def test_perplexity_under_three_ranks_is_that_of_transformers(real, tmp_path):
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    convert(ConvertOptions(load=str(real / "model"), save=str(tmp_path / "m"), target_tensor_parallel_size=3), World())
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


def test_a_third_of_the_real_vocabulary_says_what_the_whole_one_said(real, tmp_path):
    import torch
    from tiny import logits

    from megatron_prune.steps.vocab_count import VocabCountOptions, vocab_count
    from megatron_prune.steps.vocab_trim import VocabTrimOptions, vocab_trim
    from megatron_prune.vocabulary.id_map import load_map
    from megatron_prune.vocabulary.vocabulary import open_vocabulary

    model, counts = str(real / "model"), str(tmp_path / "counts")
    vocab_count(VocabCountOptions(tokenizer=model, input=(str(real / "calibration.txt"),), save=counts), World())
    files = {
        "save": str(tmp_path / "out"),
        "report": str(tmp_path / "report.json"),
        "held_out": (str(real / "held_out.txt"),),
    }
    vocab_trim(VocabTrimOptions(load=model, counts=(counts,), remain_vocab_size=16384, **files), World())
    report = json.loads((tmp_path / "report.json").read_text())  # made only if every covered line encodes as before, and no other
    assert report["held_out"]["same_encoding"] > 0.5 and report["held_out"]["more_tokens"] < 0.1
    whole, ids = open_vocabulary(real / "model", 49152), load_map(tmp_path / "out")
    lines = [line for line in (real / "held_out.txt").read_text().splitlines() if line.strip()]
    covered = max((found for found in whole.encode(lines) if (ids.old_to_new[found] >= 0).all()), key=len)
    before = logits(real / "model", torch.tensor([covered]))[..., torch.from_numpy(ids.new_to_old)]
    assert torch.equal(logits(tmp_path / "out", torch.from_numpy(ids.old_to_new[covered])[None]), before)
