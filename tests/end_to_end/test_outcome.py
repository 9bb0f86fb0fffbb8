"""What a pruning says at its end: parameters, and what the model and what is left of it lose on text that nothing was fitted to."""

from __future__ import annotations

import logging
import math
import re
from pathlib import Path

import pytest
import torch
from tiny import build_tiny

from megatron_prune.checkpoint.description import Told
from megatron_prune.checkpoint.manifest import Recipe
from megatron_prune.opening.opened import open_either
from megatron_prune.pruning import measure
from megatron_prune.pruning.options import QUICK
from megatron_prune.runtime.world import World
from megatron_prune.steps.convert import ConvertOptions, convert
from megatron_prune.steps.export import ExportOptions, export
from megatron_prune.steps.prune import PruneOptions, prune
from megatron_prune.steps.prune_hf import PruneHfOptions, prune_hf
from megatron_prune.text.artifact import save_samples

SAMPLES = torch.randint(307, (17, 24), generator=torch.Generator().manual_seed(5))
HELD_OUT = [7, 15]  # every eighth


@pytest.fixture
def said(caplog, monkeypatch):
    """What the log says, from the start of the test."""
    monkeypatch.setattr(logging.getLogger("megatron_prune"), "propagate", True)
    caplog.set_level(logging.INFO, "megatron_prune")
    return lambda: "\n".join(f"{record.levelname} {record.getMessage()}" for record in caplog.records)


def loss(folder: Path) -> float:
    """Of stock transformers, in float64, on the samples that are held out."""
    from transformers import AutoModelForCausalLM

    tokens = SAMPLES[HELD_OUT]
    with torch.no_grad():
        logits = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64)(tokens).logits
    return torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), tokens[:, 1:].flatten()).item()


@pytest.fixture
def samples(tmp_path) -> dict:
    save_samples(tmp_path / "samples.safetensors", SAMPLES, {"content_id": "for a test"})
    return {"data": (str(tmp_path / "samples.safetensors"),), "nsamples": 17, "seq_length": 24}


FITTED, CUT = {"reconstruct": 0}, {"refit": False, "metric": "activation"}
NARROWER, SHALLOWER = {"ffn_hidden_size_remain": 48}, {"drop_layers": (1,), "drop_mlp": (2,), "target_family": "qwen3-per-layer"}


@pytest.mark.parametrize("options", [{**NARROWER, **FITTED}, {**NARROWER, **CUT}, {**SHALLOWER, **FITTED}])
def test_losses_are_those_of_stock_transformers(tmp_path, said, samples, options):
    model = build_tiny(tmp_path / "model", "qwen3", dtype="float32")
    prune_hf(PruneHfOptions(load=str(model), save=str(tmp_path / "out"), **options, **samples), World())
    text = said()
    found = re.search(r"loss on held-out samples ([\d.]+) → ([\d.]+) nats a token: perplexity × ([\d.]+)", text)
    before, after, ratio = map(float, found.groups())
    assert abs(before - loss(model)) < 1e-3
    if "drop_mlp" not in options:  # whose class is none of transformers
        assert abs(after - loss(tmp_path / "out")) < 1e-3
    assert abs(ratio / math.exp(after - before) - 1) < 6e-3, "of figures that are rounded"
    assert re.search(r"parameters [\d,]+ → [\d,]+ \(-\d+\.\d %\)", text) and "broken" not in text
    kept = Recipe.load(tmp_path / "out").recipe[-1].get("held_out_loss")
    assert kept == (pytest.approx({"before": before, "after": after}, abs=1e-3) if "reconstruct" in options else None)


def test_a_megatron_checkpoint_that_is_not_fitted_says_the_same(tmp_path, said, samples):
    model = build_tiny(tmp_path / "model", "llama", dtype="float32")
    convert(ConvertOptions(load=str(model), save=str(tmp_path / "m")), World())
    cut = {"ffn_hidden_size_remain": 48, "metric": "activation", "refit": False}
    prune(PruneOptions(load=str(tmp_path / "m"), save=str(tmp_path / "p"), **cut, **samples), World())
    export(ExportOptions(load=str(tmp_path / "p"), save=str(tmp_path / "hf")), World())
    before, after = map(float, re.search(r"held-out samples ([\d.]+) → ([\d.]+)", said()).groups())
    assert abs(before - loss(model)) < 1e-3 and abs(after - loss(tmp_path / "hf")) < 1e-3


def test_a_broken_model_is_called_so(tmp_path, said):
    """One that copies a token it saw, and can no more without its layers."""
    from megatron_prune.pruning.fit import Losses
    from megatron_prune.pruning.procedure import say_outcome

    say_outcome(100, 60, Losses(dense=3.0, pruned=5.31))
    assert "INFO parameters 100 → 60 (-40.0 %)" in said() and "perplexity × 10.1" in said()
    assert "WARNING by its loss the pruned model is broken" in said()
    for pruned in (float("nan"), float("inf"), 900.0):
        say_outcome(100, 60, Losses(dense=3.0, pruned=pruned))
    assert said().count("broken") == 4


def test_nothing_is_sampled_that_no_metric_reads(tmp_path, said, monkeypatch):
    def sample(*arguments):
        raise AssertionError("sampled")

    monkeypatch.setattr(measure, "own_samples", sample)
    model = build_tiny(tmp_path / "model", "llama")
    prune_hf(PruneHfOptions(load=str(model), save=str(tmp_path / "a"), drop_layers=(1, 2), refit=False), World())
    assert "its loss was not measured: no text was read" in said()
    with pytest.raises(AssertionError, match="sampled"):
        prune_hf(PruneHfOptions(load=str(model), save=str(tmp_path / "b"), num_layers_remain=2, refit=False), World())
    with pytest.raises(AssertionError, match="sampled"):
        prune_hf(PruneHfOptions(load=str(model), save=str(tmp_path / "c"), drop_layers=(1, 2)), World())


def test_a_plan_alone_says_that_nothing_is_fitted(tmp_path, said, samples):
    model = build_tiny(tmp_path / "model", "llama")
    cut = {"ffn_hidden_size_remain": 48, "metric": "magnitude", "save_plan": str(tmp_path / "plan.json")}
    prune_hf(PruneHfOptions(load=str(model), save=str(tmp_path / "a"), **cut), World())
    assert "nothing is re-fitted" not in said()
    prune_hf(PruneHfOptions(load=str(model), save=str(tmp_path / "b"), plan=str(tmp_path / "plan.json")), World())
    assert "WARNING the plan is applied as it is, nothing is re-fitted: name text with --data, or pass --refit" in said()
    again = {"plan": str(tmp_path / "plan.json"), "reconstruct": 0, **samples}
    prune_hf(PruneHfOptions(load=str(model), save=str(tmp_path / "c"), **again), World())
    assert said().count("nothing is re-fitted") == 1


def test_quick_is_its_settings_by_hand_and_what_is_set_otherwise_stays(tmp_path, said, samples):
    model = build_tiny(tmp_path / "model", "llama", dtype="float32")
    del samples["nsamples"], samples["seq_length"]
    given = {"load": str(model), "ffn_hidden_size_remain": 48, "seq_length": 24, **samples}
    prune_hf(PruneHfOptions(save=str(tmp_path / "quick"), quick=True, nsamples=9, **given), World())
    by_hand = {**QUICK, **given, "nsamples": 9}
    prune_hf(PruneHfOptions(save=str(tmp_path / "hand"), **by_hand), World())
    read = lambda name: (tmp_path / name / "model.safetensors").read_bytes()
    assert read("quick") == read("hand")


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_a_re_fitted_checkpoint_has_the_content_id_of_what_it_is_exported_as(tmp_path, samples, dtype):
    """So that what is measured on the export, or planned for it, is of the same model."""
    model = build_tiny(tmp_path / "model", "llama", dtype=dtype)
    convert(ConvertOptions(load=str(model), save=str(tmp_path / "m")), World())
    prune(
        PruneOptions(load=str(tmp_path / "m"), save=str(tmp_path / "p"), ffn_hidden_size_remain=48, reconstruct=0, **samples),
        World(),
    )
    export(ExportOptions(load=str(tmp_path / "p"), save=str(tmp_path / "hf")), World())
    written, exported = (open_either(str(tmp_path / name), World(), Told()) for name in ("p", "hf"))
    digest = exported._digest(label="", strict=True)  # noqa: SLF001  what its files hold
    assert written.recorded_identity == exported.recorded_identity == digest
