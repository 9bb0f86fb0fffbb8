"""Costs of blocks and the plans made of them: the same at every layout, kept beside scores."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import rank_jobs
from tiny import TEXT

from megatron_prune.arch.tensors import parameter_count
from megatron_prune.checkpoint import huggingface, megatron
from megatron_prune.errors import InputError
from megatron_prune.planning.costs_file import FILE, load_costs
from megatron_prune.runtime.world import World
from megatron_prune.steps.convert import ConvertOptions, convert
from megatron_prune.steps.prune import PruneOptions, prune
from megatron_prune.steps.prune_hf import PruneHfOptions, prune_hf

LAYOUTS = [(2, 1, 1), (1, 1, 2), (1, 2, 1), (2, 1, 2)]
"""TP, PP, DP."""


@pytest.fixture(scope="module")
def home(tiny, tmp_path_factory) -> Path:
    """``model`` and ``other`` (other weights) at TP 1 in float32, and ``text.txt``."""
    home = tmp_path_factory.mktemp("allocate")
    for name, changes in (("model", {}), ("other", {"seed": 1})):
        folder = tiny("qwen2", dtype="float32", num_key_value_heads=4, **changes)
        convert(ConvertOptions(load=str(folder), save=str(home / name)), World())
    (home / "text.txt").write_text("".join(f"{number}: {TEXT}" for number in range(60)))
    return home


@pytest.fixture(scope="module")
def scored(home, ranks):
    """``scored(tp, pp, dp)`` → scores with costs, made at that layout."""

    def get(tp: int = 1, pp: int = 1, dp: int = 1) -> Path:
        folder = home / f"scores{tp}{pp}{dp}"
        if not folder.exists():
            given = {"load": str(home / "model"), "save": str(folder), "data": (f"{home / 'text.txt'}:1",), "costs": True}
            given |= {"nsamples": 10, "seq_length": 16, "metrics": ("activation,obs,fold,fisher",)}
            sizes = {"tensor_model_parallel_size": tp, "pipeline_model_parallel_size": pp}
            ranks(tp * pp * dp).run(rank_jobs.run_steps, ("score", {**given, **sizes}))
        return folder

    return get


def pruned(home: Path, scores: Path, save: Path, ranks, tp: int, pp: int = 1, **options) -> dict:
    """Options of a pruning by kept scores; run on ``tp × pp`` ranks."""
    given = {"load": str(home / "model"), "save": str(save), "scores": str(scores), "allocate": "free", "ratio": 0.2}
    given |= {"reconstruct": 0, "tensor_model_parallel_size": tp, "pipeline_model_parallel_size": pp, **options}
    ranks(tp * pp).run(rank_jobs.run_steps, ("prune", given))
    return json.loads(next(save.glob("*/plan.json")).read_text())


@pytest.mark.parametrize("layout", LAYOUTS)
def test_costs_are_the_same_at_every_layout(home, scored, layout):
    config = megatron.open_checkpoint(home / "model").tensors.config
    ours, theirs = load_costs(scored(), config), load_costs(scored(*layout), config)
    assert theirs.dense == pytest.approx(ours.dense, abs=1e-5)
    for kind, losses in ours.alone.items():
        assert np.isfinite(losses).all()
        assert np.abs(theirs.alone[kind] - losses).max() < 2e-5
        assert np.abs(theirs.together[kind] - ours.together[kind]).max() < 2e-5


def test_plans_are_the_same_at_every_layout(home, scored, tmp_path, ranks):
    one = pruned(home, scored(), tmp_path / "one", ranks, 1, prune_type="global", multiple_of="ffn=8,kv_head=2")
    two = pruned(home, scored(2, 1, 1), tmp_path / "two", ranks, 2, prune_type="global", multiple_of="ffn=8,kv_head=2")
    assert (one["new"], one["layers"]) == (two["new"], two["layers"])
    assert any(isinstance(size, list) for size in one["new"].values())


@pytest.mark.parametrize("tp, pp, prune_type", [(2, 1, "balance"), (2, 2, "balance"), (2, 1, "unbalance")])
def test_what_is_written_keeps_the_budget_and_divides_over_the_ranks(home, scored, tmp_path, ranks, tp, pp, prune_type):
    pruned(home, scored(), tmp_path / "out", ranks, tp, pp, prune_type=prune_type)
    old, new = (megatron.open_checkpoint(folder).tensors.config for folder in (home / "model", tmp_path / "out"))
    assert parameter_count(new) <= 0.8 * parameter_count(old)
    assert new.num_layers % pp == 0
    if prune_type == "balance":
        assert all(size % tp == 0 for name in ("ffn_hidden_size", "num_query_groups") for size in new.each(name))


def test_costs_of_another_model_or_of_units_chosen_otherwise_are_refused(home, scored, tmp_path):
    given = {"save": str(tmp_path / "out"), "allocate": "free", "ratio": 0.2}
    with pytest.raises(InputError, match="another model of the same shape"):
        prune(PruneOptions(load=str(home / "other"), scores=str(scored()), **given), World())
    with pytest.raises(InputError, match="costs of ffn were measured(.|\n)*got: fisher\\s+needed: obs"):
        prune(PruneOptions(load=str(home / "model"), scores=str(scored()), metric="obs", depth_metric="fold", **given), World())


def test_kept_costs_are_used_by_the_route_without_megatron_too(home, tiny, scored, tmp_path, monkeypatch):
    """No probe is made again, and a budget of another size takes no measuring."""
    monkeypatch.setattr("megatron_prune.surgery.probes.Probes.__init__", None)
    model = tiny("qwen2", dtype="float32", num_key_value_heads=4)
    sizes = []
    for ratio in (0.15, 0.3):
        given = {"scores": str(scored()), "allocate": "free", "ratio": ratio, "reconstruct": 0}
        prune_hf(PruneHfOptions(load=str(model), save=str(tmp_path / f"{ratio}"), **given), World())
        sizes.append(parameter_count(huggingface.open_model(tmp_path / f"{ratio}").tensors.config))
    whole = parameter_count(huggingface.open_model(model).tensors.config)
    assert sizes[1] <= 0.7 * whole < sizes[0] <= 0.85 * whole


def test_scores_without_costs_are_enough(home, scored, tmp_path, ranks):
    """They are measured then."""
    bare = tmp_path / "bare"
    shutil.copytree(scored(), bare)
    (bare / FILE).unlink()
    kept = pruned(home, scored(), tmp_path / "kept", ranks, 1)
    again = pruned(home, bare, tmp_path / "again", ranks, 1)
    assert (kept["new"], kept["layers"]) == (again["new"], again["layers"])


def test_costs_need_metrics_that_choose_units_of_every_axis(home, tmp_path, ranks):
    from megatron_prune.steps.score import ScoreOptions, score

    given = {"load": str(home / "model"), "save": str(tmp_path / "out"), "data": (f"{home / 'text.txt'}:1",)}
    with pytest.raises(InputError, match="--costs: none of the metrics scores ffn\\s+got: fold"):
        score(ScoreOptions(metrics=("fold",), costs=True, **given), World())
