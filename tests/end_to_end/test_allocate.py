"""Budgets dealt out by measured costs: a probe says what stock transformers loses, and what is written fits the budget."""

from __future__ import annotations

import json
from math import prod
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import safe_open
from tiny import FAMILIES, build_tiny

from megatron_prune.arch.blocks.block import BLOCKS
from megatron_prune.arch.model import ModelConfig
from megatron_prune.errors import InputError
from megatron_prune.opening.opened import open_huggingface
from megatron_prune.planning.allocators.free import Free
from megatron_prune.planning.costs import Costs, levels, sizes_at
from megatron_prune.planning.loss_weights import LOSS_WEIGHTS
from megatron_prune.pruning import costs as measuring
from megatron_prune.pruning.engines.huggingface import HuggingFaceEngine
from megatron_prune.pruning.measure import CalibrationOptions, Subject, measure
from megatron_prune.runtime.world import World
from megatron_prune.steps.prune_hf import PruneHfOptions, prune_hf
from megatron_prune.surgery.probes import Probes
from megatron_prune.text.artifact import save_samples
from megatron_prune.text.tokens import Calibration

SAMPLES = torch.randint(307, (12, 24), generator=torch.Generator().manual_seed(3))
PROBED = [0, 2, 3, 5, 6, 8, 9, 11]
"""Numbers of the samples that losses are measured on: the middles of eight equal parts."""


def random_scores(config: ModelConfig) -> dict[tuple[str, int], torch.Tensor]:
    generator = torch.Generator().manual_seed(7)
    places = [(axis, layer) for axis in ("ffn", "kv_head", "head") for layer in range(config.num_layers)]
    return {(axis, layer): torch.rand(config.of_layer(layer).units(axis), generator=generator).double() for axis, layer in places}


def measured(folder: Path, work: Path) -> Costs:
    """The costs of a Hugging Face directory's blocks on :data:`SAMPLES`, units chosen by :func:`random_scores`."""
    model = open_huggingface(folder, World())
    subject = Subject(model=model, engine=HuggingFaceEngine(model), tokenizer=None)
    lengths = torch.full((len(SAMPLES),), SAMPLES.shape[1])
    text = Calibration(tokens=SAMPLES, lengths=lengths, weights=torch.ones(len(SAMPLES), dtype=torch.float64))
    work.mkdir()
    statistics = measure([], measuring.needed_moments(model.config), CalibrationOptions(), subject, text, work)
    metrics = dict.fromkeys(("ffn", "kv_head", "head"), "random")
    return measuring.measured_costs(subject, random_scores(model.config), metrics, statistics, text, work, torch.float32)


class Oracle:
    """A stock model in float64, of whose writers some are exchanged."""

    def __init__(self, folder: Path, config: ModelConfig):
        from transformers import AutoModelForCausalLM

        self.model, self.config = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64).eval(), config
        self.scores, self.seen = random_scores(config), {}
        after_attention = "pre_feedforward_layernorm" if config.after_norms else "post_attention_layernorm"
        hooks = []
        for number, layer in enumerate(self.model.model.layers):
            hooks += [
                self._keep(layer.self_attn.o_proj, ("attention", number)),
                self._keep(layer.mlp.down_proj, ("gated", number)),
                self._keep(getattr(layer, after_attention), ("after attention", number)),
                layer.register_forward_hook(lambda m, g, made, n=number: self._see(("after gated", n), made)),
            ]
        with torch.no_grad():
            self.model(SAMPLES)
        for hook in hooks:
            hook.remove()

    def _keep(self, module, name):
        return module.register_forward_hook(lambda m, given, made: self._see(name, given[0]))

    def _see(self, name, value):
        self.seen[name] = (value[0] if isinstance(value, tuple) else value).detach().flatten(0, 1)

    def matrix(self, kind: str, layer: int):
        block = self.model.model.layers[layer]
        return (block.self_attn.o_proj if kind == "attention" else block.mlp.down_proj).weight

    def fitted(self, kind: str, layer: int, kept: dict[str, int]) -> torch.Tensor:
        """The writer that reads some units alone: ridge regression to what the whole one gives, tokens weighted evenly."""
        weight = self.matrix(kind, layer).detach().clone()
        found = torch.zeros_like(weight)
        if not any(kept.values()):
            return found
        x, after = self.seen[kind, layer], self.seen[f"after {kind}", layer]
        x = x * after.square().mean(-1, keepdim=True).rsqrt()
        keep = self.elements(kind, layer, kept)
        inside = x[:, keep]
        moment = inside.T @ inside
        damped = moment + 0.01 * moment.diagonal().mean() * torch.eye(len(keep), dtype=torch.float64)
        target = (x @ weight.T).T @ inside + 0.01 * moment.diagonal().mean() * weight[:, keep]
        found[:, keep] = torch.linalg.solve(damped, target, left=False)
        return found

    def elements(self, kind: str, layer: int, kept: dict[str, int]) -> torch.Tensor:
        best = lambda scores, count: scores.sort(descending=True).indices[:count].sort().values
        if kind == "gated":
            return best(self.scores["ffn", layer], kept["ffn"])
        groups, each = best(self.scores["kv_head", layer], kept["kv_head"]), kept["head"] // kept["kv_head"]
        per, d = self.config.heads_per_group, self.config.kv_channels
        heads = [group * per + best(self.scores["head", layer].view(-1, per)[group], each) for group in groups]
        return (torch.cat(heads)[:, None] * d + torch.arange(d)).flatten()

    def loss(self, exchanged: dict[tuple[str, int], torch.Tensor]) -> float:
        kept = {place: self.matrix(*place).detach().clone() for place in exchanged}
        with torch.no_grad():
            for place, weight in exchanged.items():
                self.matrix(*place).copy_(weight)
            found = self.model(SAMPLES[PROBED]).logits[:, :-1]
            for place, weight in kept.items():
                self.matrix(*place).copy_(weight)
        return torch.nn.functional.cross_entropy(found.flatten(0, 1), SAMPLES[PROBED][:, 1:].flatten()).item()


@pytest.mark.parametrize("family", FAMILIES)
def test_a_probe_loses_what_stock_transformers_loses_with_that_block_cut_and_fitted(tiny, tmp_path, family):
    folder = tiny(family, dtype="float32", num_key_value_heads=4)
    costs = measured(folder, tmp_path / "work")
    config = costs.config
    oracle = Oracle(folder, config)
    assert costs.dense == pytest.approx(oracle.loss({}), abs=2e-5)
    for kind in map(BLOCKS.get, config.blocks):
        for number, level in enumerate(levels(kind)):
            kept = sizes_at(level, kind, config)
            writers = {(kind.name, layer): oracle.fitted(kind.name, layer, kept) for layer in range(config.num_layers)}
            alone = [oracle.loss({place: writer}) for place, writer in writers.items()]
            assert costs.alone[kind.name][:, number] == pytest.approx(alone, abs=5e-5)
            assert costs.together[kind.name][number] == pytest.approx(oracle.loss(writers), abs=5e-5)


def test_costs_of_a_model_whose_layers_differ(tmp_path):
    """Blocks that are not there have none."""
    folder = build_tiny(tmp_path / "whole", "mistral", dtype="float32")
    narrow = run(folder, tmp_path / "narrow", allocate="uniform", ratio=None, drop_attention=(1,), drop_mlp=(2,))
    costs = measured(narrow, tmp_path / "work")
    missing = {name: np.isnan(found).all(axis=1).tolist() for name, found in costs.alone.items()}
    assert missing == {"attention": [False, True, False, False], "gated": [False, False, True, False]}
    assert np.isfinite(costs.together["gated"]).all() and costs.dense > 0


# ------------------------------------------------------------------------------------------------------------ the whole way


def run(model: Path, save: Path, **options) -> Path:
    """Prune a Hugging Face directory to three quarters of its parameters, sizes by layer free."""
    samples = save.with_name("samples.safetensors")
    if not samples.exists():
        save_samples(samples, SAMPLES, {"content_id": "for a test"})
    given = {"ratio": 0.25, "allocate": "free", "metric": "activation", "reconstruct": 0, **options}
    text = {"data": (str(samples),), "nsamples": len(SAMPLES), "seq_length": SAMPLES.shape[1]}
    prune_hf(PruneHfOptions(load=str(model), save=str(save), **text, **given), World())
    return save


def stored(folder: Path) -> int:
    """Parameters in the files of a directory."""
    total = 0
    for path in folder.glob("*.safetensors"):
        with safe_open(path, framework="pt") as file:
            total += sum(prod(file.get_slice(name).get_shape()) for name in file.keys())
    return total


@pytest.mark.parametrize("family", ["llama", "gemma3_text"])  # layers that differ in windows and positions alone
def test_the_best_of_free_and_uniform_shapes_is_written_and_keeps_the_budget(tmp_path, monkeypatch, family):
    from transformers import AutoModelForCausalLM

    seen = []
    plain = measuring.log.info
    monkeypatch.setattr("megatron_prune.pruning.fit.log.info", lambda *words: seen.append(words) or plain(*words))
    model = build_tiny(tmp_path / "model", family, dtype="float32", num_key_value_heads=6)
    out = run(model, tmp_path / "out", min_layer_ratio=0.25)
    assert 0.6 * stored(model) < stored(out) <= 0.75 * stored(model)
    losses = {summary: lost for form, summary, lost in (words for words in seen if "lost on held-out" in words[0])}
    plan = json.loads((out / "plan.json").read_text())
    best = min(losses, key=losses.get)
    assert len(losses) >= 3 and any("by layer" not in summary for summary in losses)
    assert f"pruned to {out}: {best}" in [form % tuple(rest) for form, *rest in seen if rest and form.startswith("pruned")]
    assert plan["made_by"]["allocate"] == "free"
    loaded = AutoModelForCausalLM.from_pretrained(out, trust_remote_code=True)
    with torch.no_grad():
        assert torch.isfinite(loaded(SAMPLES[:2]).logits).all()


def test_blocks_of_layers_that_may_go_first_are_those_that_a_depth_alone_would_drop(tmp_path, monkeypatch):
    given, plain = [], Free.targets
    monkeypatch.setattr(Free, "targets", lambda self, *words: given.append(words[-1]) or plain(self, *words))
    model = build_tiny(tmp_path / "model", "llama", dtype="float32", num_key_value_heads=6)
    run(model, tmp_path / "out")
    assert 1 in {len(layers) for layers, _ in given[0]}
    for layers, loss in given[0]:
        run(model, tmp_path / "alone", allocate="uniform", ratio=None, num_layers_remain=4 - len(layers), overwrite=True)
        kept = [entry["layer"] for entry in json.loads((tmp_path / "alone" / "plan.json").read_text())["layers"]]
        assert sorted([*layers, *kept]) == [0, 1, 2, 3]
        assert loss == pytest.approx(LOSS_WEIGHTS["layer"] * np.log(4 / len(kept)))


def test_a_stopped_run_goes_on_with_the_blocks_that_are_left(tmp_path, monkeypatch):
    model = build_tiny(tmp_path / "model", "qwen2", dtype="float32")
    plain, calls = Probes.alone, []

    def stop_at(number: int | None):
        def alone(self, probes):
            if len(calls) == number:
                raise KeyboardInterrupt
            calls.append([(probe.layer, probe.kind.name) for probe in probes])
            return plain(self, probes)

        monkeypatch.setattr(Probes, "alone", alone)

    stop_at(3)
    with pytest.raises(KeyboardInterrupt):
        run(model, tmp_path / "out")
    before = list(calls)
    stop_at(None)
    run(model, tmp_path / "out")
    assert len(before) == 3 and len(calls) == 8 and len({tuple(call) for call in calls}) == 8
    run(model, tmp_path / "at_once")
    plan = lambda name: json.loads((tmp_path / name / "plan.json").read_text())
    assert plan("out") == plan("at_once")


def test_a_loss_that_is_not_finite_is_refused(tmp_path, monkeypatch):
    model = build_tiny(tmp_path / "model", "llama", dtype="float32")
    monkeypatch.setattr("megatron_prune.surgery.probes.Probes._loss", lambda self, stream: float("nan"))
    with pytest.raises(InputError, match="loss of the model on this text is not finite"):
        run(model, tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "options, message",
    [
        ({"ratio": None, "ffn_hidden_size_remain": 48}, "--allocate without a budget"),
        ({"refit": False, "reconstruct": 4}, "measures on text(.|\n)*got: --no-refit"),
        ({"min_layer_ratio": 0.7, "max_layer_ratio": 0.4}, "--max-layer-ratio\\s+got: 0.7, 0.4\\s+needed: shares"),
        ({"min_layer_ratio": float("nan")}, "--min-layer-ratio\n  got: nan"),
        ({"allocate": "uniform", "min_layer_ratio": 0.3}, "--min-layer-ratio without --allocate free"),
        ({"metric": "perplexity"}, "cannot score the axis ffn|needs losses"),
        ({"drop_mlp": (1,)}, "a budget and --drop-mlp both say"),
    ],
)
def test_requests_that_fit_nothing_are_refused_before_work(tmp_path, options, message):
    model = build_tiny(tmp_path / "model", "llama", dtype="float32")
    with pytest.raises(InputError, match=message):
        run(model, tmp_path / "out", **options)
    assert not (tmp_path / "out").exists() and not list(tmp_path.glob(".out*"))
