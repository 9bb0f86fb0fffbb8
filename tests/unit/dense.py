"""Models as plain dense tensors: what the unit tests compare with. Nothing here uses the package's own layout code."""

from __future__ import annotations

from pathlib import Path

import torch
from hypothesis import strategies as st

from megatron_prune.arch.model import ModelConfig
from megatron_prune.arch.sharding import Patch
from megatron_prune.arch.tensors import TensorId
from megatron_prune.checkpoint.tensor_map import TensorMap
from megatron_prune.files.region import Region

SMALL = ModelConfig(
    num_layers=4,
    hidden_size=20,
    ffn_hidden_size=24,
    num_attention_heads=12,
    num_query_groups=6,
    kv_channels=2,
    vocab_size=29,
    tie_embeddings=False,
    qkv_bias=True,
    qk_norm=True,
)

LARGE = ModelConfig(
    num_layers=80,
    hidden_size=8192,
    ffn_hidden_size=28672,
    num_attention_heads=64,
    num_query_groups=8,
    kv_channels=128,
    vocab_size=128256,
    max_position_embeddings=8192,
    tie_embeddings=False,
)
"""A model of 70 billion parameters."""

ATTENTION, MLP = "self_attention.", "mlp."


def role_shapes(config: ModelConfig) -> dict[TensorId, tuple[int, ...]]:
    """Shape of every role tensor, spelled out."""
    h, f, v, d = config.hidden_size, config.ffn_hidden_size, config.vocab_size, config.kv_channels
    q, kv = config.num_attention_heads * d, config.num_query_groups * d
    layer = {"input_norm": (h,), "q": (q, h), "k": (kv, h), "v": (kv, h), "o": (h, q), "post_norm": (h,)}
    layer |= {"gate": (f, h), "up": (f, h), "down": (h, f)}
    if config.qkv_bias:
        layer |= {"q_bias": (q,), "k_bias": (kv,), "v_bias": (kv,)}
    if config.qk_norm:
        layer |= {"q_norm": (d,), "k_norm": (d,)}
    if config.after_norms:
        layer |= {"o_norm": (h,), "down_norm": (h,)}
    shapes = {TensorId("embedding"): (v, h), TensorId("final_norm"): (h,)}
    if not config.tie_embeddings:
        shapes[TensorId("output")] = (v, h)
    return shapes | {TensorId(role, n): shape for n in range(config.num_layers) for role, shape in layer.items()}


def random_model(config: ModelConfig, dtype: torch.dtype = torch.float32, seed: int = 0) -> dict[TensorId, torch.Tensor]:
    """Random values for every role tensor."""
    generator = torch.Generator().manual_seed(seed)
    return {t: torch.randn(shape, generator=generator).to(dtype) for t, shape in role_shapes(config).items()}


def labelled_model(config: ModelConfig) -> dict[TensorId, torch.Tensor]:
    """Every element of the whole model has a number of its own (exact in float32)."""
    model, start = {}, 1
    for tensor, shape in role_shapes(config).items():
        count = torch.Size(shape).numel()
        model[tensor] = torch.arange(start, start + count, dtype=torch.float32).view(shape)
        start += count
    assert start < 1 << 24
    return model


def fuse_qkv(config: ModelConfig, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    """``[q of the group, k, v]`` for every KV group."""
    n, d = config.num_attention_heads // config.num_query_groups, config.kv_channels
    rows = []
    for g in range(config.num_query_groups):
        rows += [q[g * n * d : (g + 1) * n * d], k[g * d : (g + 1) * d], v[g * d : (g + 1) * d]]
    return torch.cat(rows)


def fused_model(
    config: ModelConfig, model: dict[TensorId, torch.Tensor], padded: int
) -> dict[tuple[str, int | None], torch.Tensor]:
    """Megatron's full tensors under Transformer Engine's names: (name, layer) → tensor."""
    pad = lambda t: torch.cat([t, torch.zeros(padded - t.shape[0], t.shape[1], dtype=t.dtype)])
    full = {
        ("embedding.word_embeddings.weight", None): pad(model[TensorId("embedding")]),
        ("decoder.final_layernorm.weight", None): model[TensorId("final_norm")],
    }
    if TensorId("output") in model:
        full["output_layer.weight", None] = pad(model[TensorId("output")])
    for n in range(config.num_layers):
        at = lambda role: model[TensorId(role, n)]
        full[ATTENTION + "linear_qkv.layer_norm_weight", n] = at("input_norm")
        full[ATTENTION + "linear_qkv.weight", n] = fuse_qkv(config, at("q"), at("k"), at("v"))
        full[ATTENTION + "linear_proj.weight", n] = at("o")
        full[MLP + "linear_fc1.layer_norm_weight", n] = at("post_norm")
        full[MLP + "linear_fc1.weight", n] = torch.cat([at("gate"), at("up")])
        full[MLP + "linear_fc2.weight", n] = at("down")
        if config.after_norms:
            full[ATTENTION + "linear_proj.post_layernorm.weight", n] = at("o_norm")
            full[MLP + "linear_fc2.post_layernorm.weight", n] = at("down_norm")
        if config.qkv_bias:
            full[ATTENTION + "linear_qkv.bias", n] = fuse_qkv(config, at("q_bias"), at("k_bias"), at("v_bias"))
        if config.qk_norm:
            full[ATTENTION + "q_layernorm.weight", n] = at("q_norm")
            full[ATTENTION + "k_layernorm.weight", n] = at("k_norm")
    return full


def rank_part(name: str, full: torch.Tensor, ranks: int, rank: int) -> torch.Tensor:
    """What tensor-parallel ``rank`` holds of a full tensor, by equal chunks."""
    if "norm" in name:
        return full
    if name.endswith("linear_fc1.weight"):
        return torch.cat([half.chunk(ranks)[rank] for half in full.chunk(2)])
    if name.endswith(("linear_proj.weight", "linear_fc2.weight")):
        return full.chunk(ranks, dim=1)[rank]
    return full.chunk(ranks)[rank]


def raw_map(path: Path, config: ModelConfig, model: dict[TensorId, torch.Tensor]) -> TensorMap:
    """The model in one file of raw bytes, one tile per tensor."""
    tensors, offset = TensorMap(config), 0
    with open(path, "wb") as file:
        for tensor, data in model.items():
            rows, cols = data.shape[0], data[0].numel()
            tensors.add(tensor.layer, Region(path, offset, rows, cols, data.dtype), [Patch(tensor.role, 0, 0, 0, rows, cols)])
            offset += file.write(data.contiguous().view(-1).view(torch.uint8).numpy().tobytes())
    return tensors.validate(path)


def read_all(tensors: TensorMap) -> dict[TensorId, torch.Tensor]:
    """Every role tensor of a map, read through it."""
    return {t: tensors.read_block(t, range(tensors.shape(t)[0])).clone() for t in role_shapes(tensors.config)}


def assert_same_model(ours: dict[TensorId, torch.Tensor], theirs: dict[TensorId, torch.Tensor]) -> None:
    """Same tensors, bit for bit."""
    assert ours.keys() == theirs.keys()
    for tensor, data in theirs.items():
        assert ours[tensor].dtype == data.dtype and ours[tensor].shape == data.shape, tensor
        assert torch.equal(bits(ours[tensor]), bits(data)), tensor


def bits(data: torch.Tensor) -> torch.Tensor:
    return data.contiguous().view(-1).view(torch.uint8)


@st.composite
def layouts(draw, max_tensor: int = 6) -> tuple[ModelConfig, int]:
    """(configuration, tensor-parallel size that Megatron accepts for it), with more ranks than KV groups too."""
    tensor = draw(st.integers(1, max_tensor))
    if draw(st.booleans()):
        groups = tensor * draw(st.integers(1, 3))
        heads = groups * draw(st.integers(1, 3))
    else:
        groups = draw(st.sampled_from([g for g in range(1, tensor + 1) if tensor % g == 0]))
        heads = tensor * draw(st.integers(1, 3))
    d = draw(st.integers(1, 4))
    if (heads + 2 * groups) * d % tensor:
        d *= tensor
    return (
        ModelConfig(
            num_layers=draw(st.integers(1, 3)),
            hidden_size=draw(st.integers(1, 9)),
            ffn_hidden_size=tensor * draw(st.integers(1, 5)),
            num_attention_heads=heads,
            num_query_groups=groups,
            kv_channels=d,
            vocab_size=draw(st.integers(1, 40)),
            tie_embeddings=draw(st.booleans()),
            qkv_bias=draw(st.booleans()),
            qk_norm=draw(st.booleans()),
        ),
        tensor,
    )
