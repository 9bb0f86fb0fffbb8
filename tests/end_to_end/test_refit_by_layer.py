"""Re-fitting where a block goes alone or layers differ, against closed forms on what the formulas give in float64."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import oracle
import pytest
import rank_jobs
import torch
from torch.nn.functional import silu

from megatron_prune.arch.model import ModelConfig
from megatron_prune.arch.sharding import ParallelLayout
from megatron_prune.arch.tensors import EMBEDDING, TensorId
from megatron_prune.planning.plan import load_plan
from megatron_prune.runtime.world import World
from megatron_prune.steps.prune import PruneOptions, prune
from megatron_prune.text.artifact import save_samples

RIDGE = 0.05
SAMPLES = torch.randint(91, (12, 40), generator=torch.Generator().manual_seed(3))
UNIFORM = ModelConfig(
    num_layers=4,
    hidden_size=40,
    ffn_hidden_size=48,
    num_attention_heads=12,
    num_query_groups=6,
    kv_channels=8,
    vocab_size=91,
    tie_embeddings=False,
    qk_norm=True,
    max_position_embeddings=64,
)
BY_LAYER = replace(UNIFORM, ffn_hidden_size=(48, 24, 0, 48), num_attention_heads=(12, 12, 6, 12), num_query_groups=(6, 6, 6, 6))


@pytest.fixture(scope="module", params=["alike", "by layer"])
def model(request, tmp_path_factory) -> tuple[Path, ModelConfig, oracle.Model]:
    config = UNIFORM if request.param == "alike" else BY_LAYER
    weights = oracle.random_model(config)
    save = tmp_path_factory.mktemp("model") / "m"
    return oracle.write_checkpoint(save, config, weights, ParallelLayout(), family="qwen3"), config, weights


def options(load: Path, save: Path, **further) -> dict:
    """Pruning on :data:`SAMPLES`, by least squares alone."""
    samples = save.with_name("samples.safetensors")
    save_samples(samples, SAMPLES, {"content_id": "for a test"})
    text = {"data": (str(samples),), "nsamples": len(SAMPLES), "seq_length": SAMPLES.shape[1]}
    return {"load": str(load), "save": str(save), "ridge": RIDGE, "reconstruct": 0, "sequential": False, **text, **further}


def walked(config: ModelConfig, model: oracle.Model) -> dict:
    """What the writers read, and the stream before every block and at the end, float64, tokens flattened."""
    at = lambda tensor: model[tensor].double()
    stream, seen = at(EMBEDDING)[SAMPLES], {}
    for layer in range(config.num_layers):
        own, weight = config.of_layer(layer), lambda role: at(TensorId(role, layer))
        seen["before", layer] = stream
        if own.num_attention_heads:
            reads = lambda role: torch.eye(own.num_attention_heads * own.kv_channels).double() if role == "o" else weight(role)
            seen["o", layer] = oracle.attention(own, reads, oracle.norm(own, stream, weight("input_norm")))
            stream = stream + seen["o", layer] @ weight("o").T
        seen["middle", layer] = stream
        if own.ffn_hidden_size:
            normed = oracle.norm(own, stream, weight("post_norm"))
            seen["down", layer] = silu(normed @ weight("gate").T) * (normed @ weight("up").T)
            stream = stream + seen["down", layer] @ weight("down").T
    seen["before", config.num_layers] = stream
    return {key: value.flatten(0, 1) for key, value in seen.items()}


def closed_form(inputs: torch.Tensor, wanted: torch.Tensor, stream: torch.Tensor, start: torch.Tensor) -> torch.Tensor:
    """Ridge regression towards ``start``, every token divided by its size, as plain least squares on stacked rows."""
    even = stream.square().mean(dim=1, keepdim=True).rsqrt()
    x, t = inputs * even, wanted * even
    root = (RIDGE * x.square().sum(dim=0).mean()).sqrt()
    rows = torch.cat([x, root * torch.eye(x.shape[1], dtype=x.dtype)])
    return torch.linalg.lstsq(rows, torch.cat([t, root * start.double().T])).solution.T


@pytest.mark.parametrize(
    "cut, writer, starts, ends",
    [
        ({"drop_attention": (1,)}, TensorId("down", 0), ("middle", 0), ("middle", 1)),
        ({"drop_mlp": (1,)}, TensorId("o", 1), ("before", 1), ("before", 2)),
        ({"drop_mlp": (0,), "drop_attention": (1,)}, TensorId("o", 0), ("before", 0), ("middle", 1)),
        ({"drop_mlp": (3,)}, TensorId("o", 3), ("before", 3), ("before", 4)),
    ],
)
def test_a_block_that_goes_alone_is_folded_into_the_matrix_before_it(model, tmp_path, cut, writer, starts, ends):
    """That matrix predicts, by ridge regression, what both blocks added; all others stay as they were."""
    load, config, weights = model
    prune(PruneOptions(**options(load, tmp_path / "out", **cut)), World())
    found, seen = oracle.model_of(tmp_path / "out")[1], walked(config, weights)
    expected = closed_form(seen[writer.role, writer.layer], seen[ends] - seen[starts], seen[ends], weights[writer])
    assert (found[writer].double() - expected).abs().max() <= 2e-4 * expected.abs().max()
    assert found.keys() < weights.keys()
    assert all(torch.equal(data, weights[tensor]) for tensor, data in found.items() if tensor != writer)


def test_under_ranks_every_layer_of_its_own_width_is_fitted_as_in_one_process(model, ranks, tmp_path):
    load, config, weights = model
    given = {"layer_sizes": str(tmp_path / "sizes.json"), "drop_attention": (2,), "metric": "magnitude"}
    sizes = '{"0": {"ffn_hidden_size": 24, "num_query_groups": 3}, "1": {"mlp": "none"}, "3": {"num_attention_heads": 6}}'
    (tmp_path / "sizes.json").write_text(sizes)
    one = options(load, tmp_path / "one", save_plan=str(tmp_path / "plan.json"), prune_type="global", **given)
    prune(PruneOptions(**one), World())
    plan, seen, found = load_plan(tmp_path / "plan.json"), walked(config, weights), oracle.model_of(tmp_path / "one")[1]
    kept, down = plan.layers[0].ffn, TensorId("down", 0)
    wanted = seen["before", 1] - seen["middle", 0]
    expected = closed_form(seen["down", 0][:, kept], wanted, seen["before", 1], weights[down][:, kept])
    assert (found[down].double() - expected).abs().max() <= 2e-4 * expected.abs().max()
    again = options(load, tmp_path / "two", plan=str(tmp_path / "plan.json"), tensor_model_parallel_size=3)
    ranks(3).run(rank_jobs.run_steps, ("prune", again))
    other = oracle.model_of(tmp_path / "two")[1]
    assert found.keys() == other.keys()
    for tensor, data in found.items():
        assert (other[tensor] - data).abs().max() <= 1e-4 * data.abs().max(), tensor


def test_under_ranks_a_window_of_layers_learns_together_as_in_one_process(model, ranks, tmp_path):
    """Only the first process keeps the layers that are done; what all of them step together is filed by it."""
    load, _, _ = model
    given = {"drop_layers": (1,), "metric": "magnitude", "ridge": 30.0, "reconstruct": 2}  # what least squares leaves to do
    prune(PruneOptions(**options(load, tmp_path / "one", **given)), World())
    prune(PruneOptions(**options(load, tmp_path / "none", **{**given, "reconstruct": 0})), World())
    ranks(3).run(rank_jobs.run_steps, ("prune", options(load, tmp_path / "two", **given, tensor_model_parallel_size=3)))
    found, start, other = (oracle.model_of(tmp_path / name)[1] for name in ("one", "none", "two"))
    moved = {tensor for tensor, data in found.items() if not torch.equal(data, start[tensor])}
    assert {tensor.layer for tensor in moved} == {0, 1, 2}  # the layer before the gap, and those after it
    for tensor, data in found.items():
        step = (data - start[tensor]).abs().max()
        assert (other[tensor] - data).abs().max() <= 0.02 * step + 1e-4 * data.abs().max(), tensor
