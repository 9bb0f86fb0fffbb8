"""Whole units with their gradients, of two functionals, under TP × PP × DP, equal plain autograd on stock transformers.

The metrics and the second functional (``tests/trial_metrics.py``) belong to the tests; the reference knows nothing of the
project: units by slices of a Hugging Face model's matrices, gradients sample by sample, float64.
"""

from __future__ import annotations

from pathlib import Path
from typing import Callable

import pytest
import rank_jobs_gradients as jobs
import torch
from safetensors.torch import load_file
from trial_metrics import registered

from megatron_prune.checkpoint import megatron
from megatron_prune.importance.metric import metric_named
from megatron_prune.importance.scoring import all_scores
from megatron_prune.importance.statistics import Statistics
from megatron_prune.runtime.world import World
from megatron_prune.steps.convert import ConvertOptions, convert

TOLERANCE = 5e-5
"""Of the largest score, as for sums over weights (``test_gradients.py``)."""
SAMPLES = {
    "tokens": torch.randint(0, 307, (3, 13), generator=torch.Generator().manual_seed(6)).tolist(),
    "lengths": [13, 6, 10],
    "weights": [1.0, 0.5, 1.75],
}
NAMES = ["trial_saliency", "trial_saliency:trim=3", "trial_group", "taylor"]
LAYOUTS = [(1, 1, 1), (2, 1, 1), (3, 1, 1), (2, 2, 1), (1, 1, 2)]
"""TP, PP, DP."""


@pytest.fixture(scope="module")
def made(tiny, tmp_path_factory) -> tuple[str, Path]:
    """(Megatron checkpoint, Hugging Face directory) with biases, in float32."""
    source, target = tiny("qwen2", dtype="float32"), tmp_path_factory.mktemp("model") / "megatron"
    convert(ConvertOptions(load=str(source), save=str(target)), World())
    return str(target), source


@pytest.fixture(scope="module")
def expected(made) -> dict[str, torch.Tensor]:
    return reference(made[1])


# --------------------------------------------------------------------------- the reference: dense, float64, Hugging Face


def _gradients(model, functional: Callable) -> list[dict[str, torch.Tensor]]:
    """Of every sample, by parameter."""
    found = []
    for tokens, length in zip(SAMPLES["tokens"], SAMPLES["lengths"]):
        model.zero_grad()
        functional(model, torch.tensor([tokens[:length]])).backward()
        found.append({name: parameter.grad.clone() for name, parameter in model.named_parameters() if parameter.grad is not None})
    return found


def _cross_entropy(model, tokens):
    return torch.nn.functional.cross_entropy(model(tokens).logits[0, :-1], tokens[0, 1:])


def _feature_norms(model, tokens):
    seen, handles = [], []
    for name, module in model.named_modules():
        if name.endswith(("gate_proj", "up_proj", "down_proj")):
            handles.append(module.register_forward_hook(lambda module, given, output: seen.append(output.norm())))
    model(tokens)
    for handle in handles:
        handle.remove()
    return sum(seen)


def _by_channel(named, layer: int) -> torch.Tensor:
    """[3, channels, hidden]: what channels own of gate, up and down."""
    of = lambda role: named[f"model.layers.{layer}.mlp.{role}_proj.weight"]
    return torch.stack([of("gate"), of("up"), of("down").T])


def _by_group(named, layer: int, groups: int) -> dict[str, torch.Tensor]:
    """Axis → [units, all that a unit owns]."""
    of = lambda role, kind="weight": named[f"model.layers.{layer}.self_attn.{role}_proj.{kind}"]
    queries = torch.cat([of("q"), of("q", "bias")[:, None], of("o").T], dim=1)
    keys = torch.cat([of("k"), of("k", "bias")[:, None], of("v"), of("v", "bias")[:, None]], dim=1)
    head = queries.unflatten(0, (-1, 8)).flatten(1)
    return {"head": head, "kv_head": torch.cat([part.unflatten(0, (groups, -1)).flatten(1) for part in (queries, keys)], dim=1)}


def reference(source) -> dict[str, torch.Tensor]:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float64, attn_implementation="eager").eval()
    named = {name: parameter.detach() for name, parameter in model.named_parameters()}
    grads = {"trial_features": _gradients(model, _feature_norms), "cross_entropy": _gradients(model, _cross_entropy)}
    weights, found = torch.tensor(SAMPLES["weights"], dtype=torch.float64), {}
    for layer in range(model.config.num_hidden_layers):
        for objective, samples in grads.items():
            of = "" if objective == "cross_entropy" else f"@{objective}"
            for trim, spelling in ((1, "trial_saliency"), (3, "trial_saliency:trim=3")):
                products = [(_by_channel(named, layer) * _by_channel(sample, layer)).sum(0) for sample in samples]
                means = [product.sort(dim=1).values[:, trim:-trim].mean(1).abs() for product in products]
                found[f"{spelling}{of}.ffn.{layer}"] = sum(weight * mean for weight, mean in zip(weights, means))
        mean = lambda values: sum(weight * value for weight, value in zip(weights, values)) / weights.sum()
        total = {name: mean([sample[name] for sample in grads["cross_entropy"]]) for name in named}
        squares = {name: mean([sample[name] ** 2 for sample in grads["cross_entropy"]]) for name in named}
        parts = lambda values: {
            "ffn": _by_channel(values, layer).movedim(0, 1).flatten(1),
            **_by_group(values, layer, model.config.num_key_value_heads),
        }
        for axis, weight in parts(named).items():
            first, second = (weight * parts(total)[axis]).sum(1), (weight**2 * parts(squares)[axis]).sum(1)
            found[f"trial_group.{axis}.{layer}"] = first**2 + second / 2
    return found


# ---------------------------------------------------------------------------------------------------------- comparisons


def _collect(ranks, checkpoint, folder, tp, pp, dp, names=NAMES):
    counted = ranks(tp * pp * dp).run(jobs.trial_gradients, checkpoint, str(folder), SAMPLES, tp, pp, names, "float32")
    return load_file(folder / "gradients.safetensors"), counted


@pytest.mark.parametrize("tp, pp, dp", LAYOUTS)
def test_sums_over_whole_units_equal_those_of_dense_autograd(made, expected, ranks, tmp_path, tp, pp, dp):
    found, counted = _collect(ranks, made[0], tmp_path, tp, pp, dp)
    assert {key for key in found if not key.startswith("taylor.")} == set(expected)
    for key, value in expected.items():
        assert found[key].dtype == torch.float64
        assert (found[key] - value).abs().max() < TOLERANCE * value.abs().max(), key
    assert sum(counted) == 2 * sum(SAMPLES["lengths"]) * tp * pp, "one pass for each objective"


def test_the_last_word_joins_both_functionals_over_all_layers(made, expected, ranks, tmp_path):
    _collect(ranks, made[0], tmp_path, 3, 1, 1, ["trial_saliency"])
    opened = megatron.open_checkpoint(Path(made[0]))
    with registered():
        metric = metric_named("trial_saliency", statistics=Statistics(folder=tmp_path, config=opened.config))
        ours = all_scores(metric, opened.tensors, opened.layout, World())
    layers = range(opened.config.num_layers)
    features = torch.stack([expected[f"trial_saliency@trial_features.ffn.{layer}"] for layer in layers])
    losses = torch.stack([expected[f"trial_saliency.ffn.{layer}"] for layer in layers]) ** 2
    joined = (features - features.mean()) / features.std() + (losses - losses.mean()) / losses.std()
    for layer in layers:
        assert (ours["ffn", layer] - joined[layer]).abs().max() < 10 * TOLERANCE * joined.abs().max()


def test_a_second_run_adds_only_what_lacks_of_each_functional(made, ranks, tmp_path):
    once = sum(SAMPLES["lengths"])
    _, counted = _collect(ranks, made[0], tmp_path, 1, 1, 1, ["trial_group", "fisher"])
    assert counted == [once]
    before, counted = _collect(ranks, made[0], tmp_path, 1, 1, 1, ["trial_saliency", "trial_group"])
    assert counted == [2 * once]
    after, counted = _collect(ranks, made[0], tmp_path, 1, 1, 1, ["trial_saliency", "fisher"])
    assert counted == [0] and all(torch.equal(after[key], before[key]) for key in before)
