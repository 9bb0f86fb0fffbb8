"""Gradient metrics and losses under TP × PP × DP equal those of plain autograd on stock transformers in float64.

The reference knows nothing of this project: per-sample gradients of a Hugging Face model, units by slices of its matrices.
Ours computes in float32. A gradient's error there is about 1e-6 of the largest in its matrix, a unit sums thousands of
magnitudes, and errors of single weights average out. A lost or doubled part (a norm
counted on every rank, half of a tied gradient, an unmasked pad) changes scores by 1e-3 to 1; 5e-5 tells the two apart.
"""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import rank_jobs_gradients as jobs
import torch
from ranks import RankFailed
from safetensors.torch import load_file

from megatron_prune.importance.metric import METRICS
from megatron_prune.importance.statistics import Statistics
from megatron_prune.runtime.world import World
from megatron_prune.steps.convert import ConvertOptions, convert

TOLERANCE = 5e-5
METRIC_NAMES = ["taylor", "taylor_2nd", "snip", "fisher"]
SAMPLES = {
    "tokens": torch.randint(0, 307, (5, 17), generator=torch.Generator().manual_seed(5)).tolist(),
    "lengths": [17, 9, 17, 2, 13],
    "weights": [1.0, 0.5, 1.25, 2.0, 0.75],
}
LAYOUTS = [(1, 1, 1), (2, 1, 1), (3, 1, 1), (1, 2, 1), (2, 2, 1), (1, 1, 2), (2, 1, 2), (1, 2, 2)]
"""TP, PP, DP."""
MODELS = {
    "gemma3, norms after blocks": ("gemma3_text", {}, [(1, 1, 1), (2, 1, 1), (1, 2, 1)]),
    "llama, untied": ("llama", {}, LAYOUTS),
    "llama, tied": ("llama", {"tie_word_embeddings": True}, [(1, 2, 1), (2, 2, 1), (2, 1, 2), (1, 4, 1)]),
    "mistral, window of 7": ("mistral", {"sliding_window": 7}, [(1, 1, 1), (3, 1, 1), (1, 2, 1)]),
    "qwen2, biases, tied": ("qwen2", {"tie_word_embeddings": True}, LAYOUTS),
    "qwen2, 2 KV groups on 4 ranks": ("qwen2", {"num_key_value_heads": 2}, [(4, 1, 1), (2, 2, 1)]),
    "qwen3, q and k norms, wide heads": ("qwen3", {"head_dim": 16}, [(1, 1, 1), (3, 1, 1), (2, 2, 1), (2, 1, 2)]),
    "qwen3, 1 KV group on 4 ranks": ("qwen3", {"num_key_value_heads": 1}, [(1, 1, 1), (2, 1, 1), (4, 1, 1)]),
}
CASES = [
    pytest.param(family, changes, *layout, id="{}, TP {} PP {} DP {}".format(name, *layout))
    for name, (family, changes, layouts) in MODELS.items()
    for layout in layouts
]


# --------------------------------------------------------------------------- the reference: dense, float64, Hugging Face


def _model(source):
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(source, dtype=torch.float64, attn_implementation="eager").eval()


def _sample_loss(model, tokens: list[int], length: int):
    logits = model(torch.tensor([tokens[:length]])).logits[0, :-1]
    return torch.nn.functional.cross_entropy(logits, torch.tensor(tokens[1:length]))


def _per_sample(model):
    """Per-sample gradients of every parameter, {name: [samples, …]}, and Σ w Σ_t (a·∂ΣL/∂a) products by module."""
    grads: dict[str, list] = {}
    gates: dict[str, list] = {}
    for tokens, length in zip(SAMPLES["tokens"], SAMPLES["lengths"]):
        inputs: dict[str, torch.Tensor] = {}
        handles = []
        for name, module in model.named_modules():
            if name.endswith(("o_proj", "down_proj")):

                def keep(module, given, name=name):
                    given[0].retain_grad()
                    inputs[name] = given[0]

                handles.append(module.register_forward_pre_hook(keep))
        model.zero_grad()
        _sample_loss(model, tokens, length).backward()
        for handle in handles:
            handle.remove()
        for name, parameter in model.named_parameters():
            grads.setdefault(name, []).append(parameter.grad.clone())
        for name, value in inputs.items():
            gates.setdefault(name, []).append((value * value.grad)[0].detach() * (length - 1))
    return {name: torch.stack(values) for name, values in grads.items()}, gates


def _weight_scores(name: str, weight, grads):
    """What each weight contributes, by the papers' formulas."""
    w = torch.tensor(SAMPLES["weights"], dtype=torch.float64).view(-1, *[1] * weight.dim())
    mean, squares = (w * grads).sum(0) / w.sum(), (w * grads**2).sum(0) / w.sum()
    if name == "taylor":
        return (weight * mean).abs()
    if name == "taylor_2nd":
        return (weight * mean).abs() + weight**2 * squares / 2
    return (w * (weight * grads).abs()).sum(0)


def reference(source) -> dict[str, torch.Tensor]:
    """Every vector of ``gradients.safetensors``, by its key."""
    model = _model(source)
    config, (grads, gates) = model.config, _per_sample(model)
    d, layers = config.head_dim if hasattr(config, "head_dim") else 8, config.num_hidden_layers
    heads, groups = config.num_attention_heads, config.num_key_value_heads
    out: dict[str, torch.Tensor] = {}
    for metric in ("taylor", "taylor_2nd", "snip"):
        offset = lambda name: 1.0 if "norm" in name and config.model_type == "gemma3_text" else 0.0  # without it nothing is left
        part = {name: _weight_scores(metric, p.detach() + offset(name), grads[name]) for name, p in model.named_parameters()}
        hidden = part["model.embed_tokens.weight"].sum(0) + part["model.norm.weight"]
        if "lm_head.weight" in part:
            hidden = hidden + part["lm_head.weight"].sum(0)
        whole = []
        for layer in range(layers):
            mine = {name.split(f"layers.{layer}.")[1]: v for name, v in part.items() if f"layers.{layer}." in name}
            whole.append(sum(value.sum() for value in mine.values()))
            q, k, v = (mine[f"self_attn.{role}_proj.weight"] for role in "qkv")
            o, down = mine["self_attn.o_proj.weight"], mine["mlp.down_proj.weight"]
            gate, up = mine["mlp.gate_proj.weight"], mine["mlp.up_proj.weight"]
            norms = sum(value for name, value in mine.items() if name.endswith("layernorm.weight"))
            hidden = hidden + norms + sum(m.sum(0) for m in (q, k, v, gate, up)) + o.sum(1) + down.sum(1)
            rows = {role: m.sum(1) for role, m in zip("qkv", (q, k, v))}
            for role in "qkv":
                if f"self_attn.{role}_proj.bias" in mine:
                    rows[role] = rows[role] + mine[f"self_attn.{role}_proj.bias"]
            head = (rows["q"] + o.sum(0)).view(heads, d).sum(1)
            out[f"{metric}.head.{layer}"] = head
            out[f"{metric}.kv_head.{layer}"] = head.view(groups, -1).sum(1) + (rows["k"] + rows["v"]).view(groups, d).sum(1)
            out[f"{metric}.ffn.{layer}"] = gate.sum(1) + up.sum(1) + down.sum(0)
        out[f"{metric}.hidden.all"], out[f"{metric}.layer.all"] = hidden, torch.stack(whole)
    for layer in range(layers):
        squares = []
        for name, each in (("mlp.down_proj", 1), ("self_attn.o_proj", d)):
            products = gates[f"model.layers.{layer}.{name}"]
            squares.append(
                sum(w * p.unflatten(1, (-1, each)).sum(2).square().sum(0) for w, p in zip(SAMPLES["weights"], products))
            )
        out[f"fisher.ffn.{layer}"], out[f"fisher.head.{layer}"] = squares
        out[f"fisher.kv_head.{layer}"] = squares[1].view(groups, -1).sum(1)
    return out


@pytest.fixture(scope="module")
def made(tiny, tmp_path_factory):
    """``made(family, changes)`` → (Megatron checkpoint, Hugging Face directory, reference), once per model."""
    known = {}

    def get(family, changes):
        key = (family, repr(changes))
        if key not in known:
            source, target = tiny(family, dtype="float32", **changes), tmp_path_factory.mktemp("model") / "megatron"
            convert(ConvertOptions(load=str(source), save=str(target)), World())
            known[key] = str(target), source, reference(source)
        return known[key]

    return get


def _collect(ranks, checkpoint, folder, tp, pp, dp, metrics=METRIC_NAMES, samples=SAMPLES, dtype="float32"):
    counted = ranks(tp * pp * dp).run(jobs.gradients, checkpoint, str(folder), samples, tp, pp, metrics, dtype)
    return load_file(folder / "gradients.safetensors"), counted


def _chosen(scores: dict[str, torch.Tensor]) -> dict[str, list[int]]:
    """The better half of the units, by every metric on every axis."""
    return {key: sorted(value.topk(len(value) // 2).indices.tolist()) for key, value in scores.items() if len(value) > 1}


# --------------------------------------------------------------------------- gradients


@pytest.mark.parametrize("family, changes, tp, pp, dp", CASES)
def test_scores_and_selections_equal_those_of_dense_autograd(made, ranks, tmp_path, family, changes, tp, pp, dp):
    checkpoint, _, expected = made(family, changes)
    found, counted = _collect(ranks, checkpoint, tmp_path, tp, pp, dp)
    assert set(found) == set(expected)
    worst = {key: ((found[key] - expected[key]).abs().max() / expected[key].abs().max()).item() for key in expected}
    assert max(worst.values()) < TOLERANCE, max(worst.items(), key=lambda item: item[1])
    assert all(value.dtype == torch.float64 for value in found.values())
    assert _chosen(found) == _chosen(expected)
    assert sum(counted) == sum(SAMPLES["lengths"]) * tp * pp


def test_what_is_not_asked_for_changes_nothing_and_a_second_run_adds_only_what_lacks(made, ranks, tmp_path):
    checkpoint, _, expected = made("llama", {"tie_word_embeddings": True})
    first, _ = _collect(ranks, checkpoint, tmp_path, 1, 2, 1, ["fisher"])
    assert set(first) == {key for key in expected if key.startswith("fisher.")}
    both, counted = _collect(ranks, checkpoint, tmp_path, 1, 2, 1, ["fisher", "taylor"])
    assert counted[0] > 0 and set(both) == {key for key in expected if key.startswith(("fisher.", "taylor."))}
    _, counted = _collect(ranks, checkpoint, tmp_path, 1, 2, 1, ["taylor", "fisher"])
    assert counted == [0, 0]
    for key, value in both.items():
        assert (value - expected[key]).abs().max() < TOLERANCE * expected[key].abs().max()


def test_squares_are_of_each_sample_and_not_of_the_sum(made):
    _, source, expected = made("llama", {})
    model = _model(source)
    grads = _per_sample(model)[0]["model.layers.0.mlp.up_proj.weight"]
    w = torch.tensor(SAMPLES["weights"], dtype=torch.float64).view(-1, 1, 1)
    of_each, of_sum = (w * grads**2).sum(0) / w.sum(), ((w * grads).sum(0) / w.sum()) ** 2
    assert (of_each - of_sum).abs().sum() > 0.3 * of_each.sum()
    assert not torch.allclose(expected["taylor.ffn.0"], expected["taylor_2nd.ffn.0"], rtol=1e-2)


def test_tokens_beyond_a_samples_end_count_nothing(made, ranks, tmp_path):
    checkpoint, _, _ = made("qwen3", {"head_dim": 16})
    other = [
        row[:length] + [(token + 1) % 307 for token in row[length:]] for row, length in zip(SAMPLES["tokens"], SAMPLES["lengths"])
    ]
    one, _ = _collect(ranks, checkpoint, tmp_path / "one", 1, 1, 1)
    two, _ = _collect(ranks, checkpoint, tmp_path / "two", 1, 1, 1, samples={**SAMPLES, "tokens": other})
    assert all(torch.equal(one[key], two[key]) for key in one)


def test_more_copies_than_samples(made, ranks, tmp_path):
    checkpoint, _, _ = made("qwen2", {"tie_word_embeddings": True})
    one_sample = {name: values[:1] for name, values in SAMPLES.items()}
    one, _ = _collect(ranks, checkpoint, tmp_path / "one", 1, 1, 1, samples=one_sample)
    three, _ = _collect(ranks, checkpoint, tmp_path / "three", 1, 1, 3, samples=one_sample)
    for key in one:
        assert (one[key] - three[key]).abs().max() <= 1e-6 * one[key].abs().max()


def test_metrics_read_their_scores_from_the_statistics(made, ranks, tmp_path):
    from megatron_prune.checkpoint import megatron

    checkpoint, _, expected = made("llama", {})
    _collect(ranks, checkpoint, tmp_path, 1, 1, 1)
    statistics = Statistics(folder=tmp_path, config=megatron.open_checkpoint(Path(checkpoint)).config)
    for name in METRIC_NAMES:
        metric = METRICS.get(name)(statistics=statistics)
        assert metric.needs == {"gradients"} and not metric.reads_weights
        for axis in metric.axes:
            key, layer = ("all", None) if axis in ("hidden", "layer") else ("1", 1)
            found = metric.finish(axis, layer, torch.zeros(1))
            assert (found - expected[f"{name}.{axis}.{key}"]).abs().max() < TOLERANCE * found.max()


def test_computing_in_bf16_stays_near(made, ranks, tmp_path):
    """bf16 keeps 8 bits: single gradients are off by per cents, and scores, sums over hundreds of weights, by less."""
    checkpoint, _, expected = made("llama", {})
    found, _ = _collect(ranks, checkpoint, tmp_path, 2, 1, 1, ["taylor"], dtype="bfloat16")
    for key, value in found.items():
        assert (value - expected[key]).abs().mean() < 0.1 * expected[key].mean()


def test_fp16_is_refused(made, ranks, tmp_path):
    checkpoint, _, _ = made("llama", {})
    with pytest.raises(RankFailed, match="cannot compute in fp16") as failed:
        _collect(ranks, checkpoint, tmp_path, 1, 1, 1, dtype="float16")
    assert set(failed.value.kinds.values()) == {"InputError"}


def _spoiled(tiny, home: Path, name: str, change) -> str:
    """Checkpoint of a tiny model one of whose tensors was changed in place."""
    from safetensors.torch import save_file

    source = home / "hf"
    os.makedirs(source)
    for file in tiny("llama", dtype="float32").iterdir():
        if file.suffix == ".safetensors":
            tensors = load_file(file)
            change(tensors[name])
            save_file(tensors, source / file.name, metadata={"format": "pt"})
        else:
            (source / file.name).write_bytes(file.read_bytes())
    convert(ConvertOptions(load=str(source), save=str(home / "megatron")), World())
    return str(home / "megatron")


@pytest.mark.parametrize("tp, pp", [(1, 1), (2, 1), (1, 2)])
def test_a_weight_that_is_not_a_number_is_named_by_every_rank(tiny, ranks, tmp_path, tp, pp):
    checkpoint = _spoiled(tiny, tmp_path, "model.layers.2.mlp.down_proj.weight", lambda weight: weight[3, 90:91].fill_(torch.nan))
    with pytest.raises(RankFailed, match="layer 2 down") as failed:
        _collect(ranks, checkpoint, tmp_path / "statistics", tp, pp, 1)
    assert failed.value.kinds == dict.fromkeys(range(tp * pp), "InputError")


@pytest.mark.parametrize("tp, pp", [(1, 1), (2, 2)])
def test_a_layer_whose_output_overflows_is_named_by_every_rank(tiny, ranks, tmp_path, tp, pp):
    checkpoint = _spoiled(tiny, tmp_path, "model.layers.2.mlp.up_proj.weight", lambda weight: weight.mul_(1e38))
    with pytest.raises(RankFailed, match="the output of layer 2 is not finite") as failed:
        _collect(ranks, checkpoint, tmp_path / "statistics", tp, pp, 1)
    assert failed.value.kinds == dict.fromkeys(range(tp * pp), "InputError")
    assert not (tmp_path / "statistics" / "gradients.safetensors").exists()


@pytest.mark.parametrize("tp, pp", [(1, 1), (2, 2)])
def test_gradients_that_overflow_are_named_from_the_last_layer_on(tiny, ranks, tmp_path, tp, pp):
    """The head's weights are 1e19 large: logits and losses are finite, and squared gradients are not."""
    checkpoint = _spoiled(tiny, tmp_path, "lm_head.weight", lambda weight: weight.mul_(1e20))
    with pytest.raises(RankFailed, match=r"gradients that are not finite[^\n]*\n  - final_norm\n  - layer 3 ") as failed:
        _collect(ranks, checkpoint, tmp_path / "statistics", tp, pp, 1)
    assert failed.value.kinds == dict.fromkeys(range(tp * pp), "InputError")


# --------------------------------------------------------------------------- losses


def _reference_losses(source) -> torch.Tensor:
    model, means = _model(source), []
    layers = model.model.layers
    weights = torch.tensor(SAMPLES["weights"], dtype=torch.float64)
    for removed in (*range(len(layers)), None):
        model.model.layers = torch.nn.ModuleList(layer for number, layer in enumerate(layers) if number != removed)
        with torch.no_grad():
            losses = torch.stack([_sample_loss(model, *given) for given in zip(SAMPLES["tokens"], SAMPLES["lengths"])])
        means.append((weights * losses).sum() / weights.sum())
    return torch.stack(means)


@pytest.mark.parametrize("tp, pp, dp", [(1, 1, 1), (3, 1, 1), (1, 2, 1), (1, 4, 1), (2, 1, 2), (1, 2, 2)])
def test_losses_without_a_layer_equal_those_of_a_model_without_it(made, ranks, tmp_path, tp, pp, dp):
    checkpoint, source, _ = made("qwen2", {"tie_word_embeddings": True})
    assert ranks(tp * pp * dp).run(jobs.losses, checkpoint, str(tmp_path), SAMPLES, tp, pp) == [5] * tp * pp * dp
    found, expected = load_file(tmp_path / "losses.safetensors")["losses"], _reference_losses(source)
    assert found.dtype == torch.float64 and (found - expected).abs().max() < 1e-5 * expected.max()
    statistics = Statistics(folder=tmp_path, config=None)
    scores = METRICS.get("perplexity")(statistics=statistics).finish("layer", None, torch.zeros(4))
    assert (scores - (expected[:-1] - expected[-1])).abs().max() < 2e-5 * expected.max()


def test_a_stopped_measurement_goes_on_where_it_was(made, ranks, tmp_path):
    from safetensors.torch import save_file

    checkpoint, _, _ = made("qwen2", {"tie_word_embeddings": True})
    half = torch.tensor([1.0, 2.0, torch.nan, torch.nan, 3.0], dtype=torch.float64)
    save_file({"losses": half}, tmp_path / "losses.safetensors")
    assert ranks(2).run(jobs.losses, checkpoint, str(tmp_path), SAMPLES, 2, 1) == [2, 2]
    found = load_file(tmp_path / "losses.safetensors")["losses"]
    assert found[[0, 1, 4]].tolist() == [1.0, 2.0, 3.0] and found.isfinite().all()
