"""Models whose layers differ in width, heads or blocks, run by megatron-core at any TP × PP, against their formulas in float64.

Ours computes in float32: logits of order 1 agree to some 1e-6; a wrong width, layer or position changes them by 0.01 and more.
"""

from __future__ import annotations

import dataclasses

import oracle
import pytest
import rank_jobs
import torch

from megatron_prune.arch.model import ModelConfig
from megatron_prune.arch.sharding import ParallelLayout, legal_tensor_sizes
from megatron_prune.arch.tensors import TensorId
from megatron_prune.checkpoint import megatron
from megatron_prune.runtime.world import World
from megatron_prune.steps.transfer import TransferOptions, transfer

TOLERANCE = 1e-4
TOKENS = torch.randint(0, 91, (2, 24), generator=torch.Generator().manual_seed(2))
BASE = ModelConfig(
    num_layers=4,
    hidden_size=40,
    ffn_hidden_size=48,
    num_attention_heads=12,
    num_query_groups=6,
    kv_channels=8,
    vocab_size=91,
    tie_embeddings=False,
    max_position_embeddings=64,
)
change = dataclasses.replace
MODELS = {
    "widths": change(BASE, ffn_hidden_size=(48, 12, 24, 36)),
    "groups, with their heads": change(BASE, num_attention_heads=(12, 12, 6, 12), num_query_groups=(6, 6, 3, 6)),
    "heads alone": change(BASE, num_attention_heads=(12, 6, 12, 6), qk_norm=True),
    "no attention, no mlp": change(
        BASE, num_attention_heads=(12, 0, 12, 6), num_query_groups=(6, 0, 6, 6), ffn_hidden_size=(0, 48, 24, 48), qkv_bias=True
    ),
    "four ranks": change(
        BASE,
        num_attention_heads=(12, 8, 0, 12),
        num_query_groups=(4, 4, 0, 12),
        ffn_hidden_size=(48, 12, 24, 0),
        tie_embeddings=True,
    ),
    "windows, rotary bases": change(BASE, sliding_window=(5, 5, None, 5), rotary_base=(100.0, 100.0, 10000.0, 100.0)),
    "no positions in some layers": change(
        BASE, rotary_base=(10000.0, None, 10000.0, None), ffn_hidden_size=(48, 12, 48, 48), num_attention_heads=(12, 6, 12, 12)
    ),
    "gemma": change(
        BASE,
        sliding_window=(5, 5, None, 5),
        rotary_base=(100.0, 100.0, 10000.0, 100.0),
        qk_norm=True,
        after_norms=True,
        zero_centered_norms=True,
        activation=("gelu_tanh", "gelu_tanh", "silu", "gelu_tanh"),
        softmax_scale=(0.2, None, 0.3, 0.2),
        scaled_embedding=True,
        tie_embeddings=True,
        ffn_hidden_size=(48, 24, 48, 12),
    ),
}
MODELS["gemma, some layers without positions"] = change(
    MODELS["gemma"], activation="gelu_tanh", softmax_scale=0.2, rotary_base=(None, 100.0, None, None)
)
LAYOUTS = [(1, 1), (2, 1), (3, 1), (1, 2), (2, 2), (4, 1)]
CASES = [
    pytest.param(name, *layout, id="{}, TP {} PP {}".format(name, *layout))
    for number, name in enumerate(MODELS)
    for layout in (LAYOUTS if name in ("no attention, no mlp", "gemma", "four ranks") else LAYOUTS[number % 2 :: 2])
    if layout[0] in legal_tensor_sizes(MODELS[name])
]


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """``model(name)`` → (its checkpoint of TP 1, its weights)."""
    made = {}

    def get(name):
        if name not in made:
            weights, home = oracle.random_model(MODELS[name]), tmp_path_factory.mktemp("model")
            made[name] = oracle.write_checkpoint(home / "m", MODELS[name], weights, ParallelLayout(), family="qwen3"), weights
        return made[name]

    return get


@pytest.mark.parametrize("name, tp, pp", CASES)
def test_logits_are_those_of_the_formulas(model, ranks, name, tp, pp):
    checkpoint, weights = model(name)
    expected = oracle.logits(MODELS[name], weights, TOKENS)
    found = ranks(tp * pp).run(rank_jobs.logits, str(checkpoint), TOKENS.tolist(), tp, pp)
    for value in found[-tp:]:
        assert (torch.from_numpy(value) - expected).abs().max() < TOLERANCE * expected.std()


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("ckpt_format", ["torch_dist", "torch"])
def test_weights_travel_through_layouts_bit_for_bit(model, tmp_path, name, ckpt_format):
    checkpoint, weights = model(name)
    tensor = max(size for size in (3, 4) if size in legal_tensor_sizes(MODELS[name]))
    options = {"target_tensor_parallel_size": tensor, "target_pipeline_parallel_size": 2, "ckpt_format": ckpt_format}
    transfer(TransferOptions(load=str(checkpoint), save=str(tmp_path / "t"), **options), World())
    opened = megatron.open_checkpoint(tmp_path / "t")
    assert opened.config == MODELS[name]
    for tensor, data in weights.items():
        assert torch.equal(opened.tensors.read_block(tensor, range(len(data))), data), tensor


def rank_state(config: ModelConfig, model: oracle.Model, tp: int, pp: int, number: int) -> dict[str, torch.Tensor]:
    """Parameters of one rank under the local layers' names, cut by Megatron's rules."""
    rank, stage, each = number % tp, number // tp, config.num_layers // pp
    rows = lambda tensor: tensor.chunk(tp)[rank]
    table = lambda role: rows(torch.nn.functional.pad(model[TensorId(role)], (0, 0, 0, 128 * tp - config.vocab_size)))
    state = {"embedding.word_embeddings.weight": table("embedding")} if stage == 0 else {}
    if stage == pp - 1:
        state |= {"decoder.final_layernorm.weight": model[TensorId("final_norm")], "output_layer.weight": table("output")}
    for local in range(each):
        at, here = (lambda role: model[TensorId(role, stage * each + local)]), f"decoder.layers.{local}."
        own = config.of_layer(stage * each + local)
        if own.num_query_groups:
            state[here + "input_layernorm.weight"] = at("input_norm")
            for kind, ending in (("weight", ""), ("bias", "_bias")) if own.qkv_bias else (("weight", ""),):
                parts = [at(role + ending).unflatten(0, (own.num_query_groups, -1)) for role in "qkv"]
                state[f"{here}self_attention.linear_qkv.{kind}"] = rows(torch.cat(parts, dim=1).flatten(0, 1))
            state[here + "self_attention.linear_proj.weight"] = at("o").chunk(tp, dim=1)[rank]
        if own.ffn_hidden_size:
            state[here + "pre_mlp_layernorm.weight"] = at("post_norm")
            state[here + "mlp.linear_fc1.weight"] = torch.cat([rows(at("gate")), rows(at("up"))])
            state[here + "mlp.linear_fc2.weight"] = at("down").chunk(tp, dim=1)[rank]
    return state


CORE = {
    "widths": MODELS["widths"],
    "groups alone": change(BASE, num_query_groups=(6, 3, 6, 6), num_attention_heads=12),
    "no attention, no mlp": change(
        BASE, num_attention_heads=(12, 0, 12, 12), num_query_groups=(6, 0, 3, 6), ffn_hidden_size=(0, 48, 24, 48), qkv_bias=True
    ),
}


@pytest.mark.parametrize("tp, pp", [(1, 1), (3, 1), (1, 2)])
@pytest.mark.parametrize("name", CORE)
def test_megatron_cores_own_loader_reads_what_its_heterogeneous_configuration_can_say(ranks, tmp_path, name, tp, pp):
    config = CORE[name]
    weights = oracle.random_model(config)
    layout = ParallelLayout(tensor=tp, pipeline=pp)
    checkpoint = oracle.write_checkpoint(tmp_path / "m", config, weights, layout, family="qwen2") / "release"
    args = ranks(1).run(rank_jobs.load_common, str(checkpoint))[0]
    loaded = ranks(tp * pp).run(rank_jobs.load_stock, str(checkpoint), args, tp, pp)
    for number, found in enumerate(loaded):
        expected = rank_state(config, weights, tp, pp, number)
        assert found.keys() == expected.keys()
        assert all(torch.equal(torch.from_numpy(found[key]), value) for key, value in expected.items())
