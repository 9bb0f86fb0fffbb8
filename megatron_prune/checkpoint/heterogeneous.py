"""Sizes by layer among Megatron's arguments: what megatron-core's ``HeterogeneousTransformerConfig`` reads.

``heterogeneous_layers_config_encoded_json`` is a JSON object whose ``block_configs`` say for every layer KV groups, FFN width and
which block is no operation. Query heads are the same in every layer there; where ours differ an entry says its own beside
(``num_attention_heads``), which megatron-core passes over: such a checkpoint needs this project's configuration to run.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

from megatron_prune.arch.model import ModelConfig
from megatron_prune.errors import CheckpointError
from megatron_prune.files.documents import parse_json

ARGUMENT = "heterogeneous_layers_config_encoded_json"


@dataclass(frozen=True, kw_only=True)
class _Attention:
    no_op: bool = False
    replace_with_linear: bool = False
    num_query_groups: int | None = None
    n_heads_in_group: int | None = None
    num_attention_heads: int | None = None


@dataclass(frozen=True, kw_only=True)
class _Mlp:
    no_op: bool = False
    replace_with_linear: bool = False
    ffn_hidden_size: int | None = None


@dataclass(frozen=True, kw_only=True)
class _Layer:
    attention: _Attention
    ffn: _Mlp | None = None
    mlp: _Mlp | None = None


@dataclass(frozen=True, kw_only=True)
class _Sizes:
    """The object; what else stands in it says again what other arguments say."""

    block_configs: list[_Layer]


def encoded(config: ModelConfig) -> str | None:
    """The argument's value; ``None`` where layers are alike in shape."""
    if config.is_uniform:
        return None
    scaling = config.each("rope_scaling")[0]
    described = {
        "hidden_act": config.each("activation")[0],
        "num_hidden_layers": config.num_layers,
        "hidden_size": config.hidden_size,
        "num_attention_heads": max(config.each("num_attention_heads")),
        "tie_word_embeddings": config.tie_embeddings,
        "rope_theta": config.each("rotary_base")[0],
        "rope_scaling": {"factor": scaling.factor if scaling else 8.0},
        "block_configs": [_layer(config, config.of_layer(layer)) for layer in range(config.num_layers)],
    }
    return json.dumps(described)


def _layer(model: ModelConfig, layer: ModelConfig) -> dict[str, Any]:
    heads, groups, channels = layer.units("head"), layer.units("kv_head"), layer.units("ffn")
    attention: dict[str, Any] = {"no_op": not heads, "replace_with_linear": False}
    attention |= {"num_query_groups": groups or None, "n_heads_in_group": layer.heads_per_group or None}
    if heads and "num_attention_heads" in model.differing:
        attention["num_attention_heads"] = heads
    mlp = {"no_op": not channels, "replace_with_linear": False, "ffn_hidden_size": channels or None}
    return {"attention": attention, "ffn": mlp}


def sizes(text: Any, heads: int, layers: int, where: object) -> dict[str, int | tuple[int, ...]]:
    """Fields of :class:`ModelConfig` that differ by layer, from the argument's value.

    Args:
        heads: query heads of layers whose entry does not say them.
        layers: how many the model has.

    Raises:
        CheckpointError: if it is no such object, or has a layer that is not carried.
    """
    if not isinstance(text, str):
        raise CheckpointError(f"{where}: {ARGUMENT}", got=type(text).__name__, needed="JSON text")
    found: dict[str, list[int]] = {"num_attention_heads": [], "num_query_groups": [], "ffn_hidden_size": []}
    for number, layer in enumerate(parse_json(text, _Sizes, f"{where}: {ARGUMENT}").block_configs):
        attention, mlp, here = layer.attention, layer.ffn or layer.mlp, f"{where}: layer {number}"
        if mlp is None or attention.replace_with_linear or mlp.replace_with_linear:
            got = "no ffn" if mlp is None else "a block that is replaced with a linear layer"
            raise CheckpointError(here, got=got, needed="attention and ffn, whole or no_op")
        own = attention.num_attention_heads or heads
        if not own and not attention.no_op:
            raise CheckpointError(f"{here}: query heads", got="nothing", needed="a number, here or as num_attention_heads")
        groups = attention.num_query_groups or own // (attention.n_heads_in_group or own or 1)
        channels = 0 if mlp.no_op else mlp.ffn_hidden_size
        if channels is None:
            raise CheckpointError(f"{here}: ffn_hidden_size", got="nothing", needed="a number, or no_op")
        if attention.no_op and not channels:
            raise CheckpointError(here, got="neither attention nor ffn", needed="a layer with one of them, or no such layer")
        found["num_attention_heads"].append(0 if attention.no_op else own)
        found["num_query_groups"].append(0 if attention.no_op else groups)
        found["ffn_hidden_size"].append(channels)
    if (count := len(found["ffn_hidden_size"])) != layers:
        raise CheckpointError(f"{where}: {ARGUMENT}", got=f"{count} layers", needed=str(layers))
    return {name: values[0] if len(set(values)) == 1 else tuple(values) for name, values in found.items()}
