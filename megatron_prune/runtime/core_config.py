"""Our description of a model as megatron-core's, whose layers may differ."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from functools import partial
from typing import Any, Callable

import torch
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor
from torch.nn.functional import gelu, silu

from megatron_prune.arch.model import ModelConfig
from megatron_prune.arch.sharding import ParallelLayout

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {"silu": silu, "gelu_tanh": partial(gelu, approximate="tanh")}


@dataclass
class DescribedConfig(TransformerConfig):
    """megatron-core's configuration of a model, or of one layer, that knows the description it was made from.

    megatron-core asks for a layer's own where ``heterogeneous_block_specs`` is set.
    """

    described: ModelConfig | None = None
    own_positions: bool = False
    """Whether every attention rotates by positions of its own, since layers differ in them."""

    def get_config_for_layer(self, layer_number: int) -> DescribedConfig:
        """Of a layer, counted from 1."""
        layer = self.described.of_layer(layer_number - 1)
        return dataclasses.replace(self, heterogeneous_block_specs=False, described=layer, **_of_layer(layer))


def _of_layer(config: ModelConfig) -> dict[str, Any]:
    """Fields in which layers may differ; sizes of blocks that a layer has not are left as they are in the model's."""
    window = config.uniform("sliding_window")
    found: dict[str, Any] = {"window_size": None if window is None else (window - 1, 0)}
    found |= {"activation_func": ACTIVATIONS[config.activation], "softmax_scale": config.softmax_scale}
    if config.units("head"):
        found |= {"num_attention_heads": config.units("head"), "num_query_groups": config.units("kv_head")}
    return found | ({"ffn_hidden_size": config.units("ffn")} if config.units("ffn") else {})


def transformer_config(config: ModelConfig, layout: ParallelLayout, dtype: torch.dtype, **further: Any) -> DescribedConfig:
    """megatron-core's description of the model and the run; ``further`` fields of it as they are."""
    largest = {name: max(config.each(name)) for name in ("num_attention_heads", "num_query_groups", "ffn_hidden_size")}
    if config.differing:
        further["heterogeneous_block_specs"] = True
        further["own_positions"] = bool({"rotary_base", "rope_scaling"} & set(config.differing))
    return DescribedConfig(
        described=config,
        num_layers=config.num_layers,
        hidden_size=config.hidden_size,
        **_of_layer(config.of_layer(0)) | largest,
        kv_channels=config.kv_channels,
        normalization="RMSNorm",
        layernorm_epsilon=config.norm_epsilon,
        layernorm_zero_centered_gamma=config.zero_centered_norms,
        gated_linear_unit=True,
        add_bias_linear=False,
        add_qkv_bias=config.qkv_bias,
        qk_layernorm=config.qk_norm,
        hidden_dropout=0.0,
        attention_dropout=0.0,
        tensor_model_parallel_size=layout.tensor,
        pipeline_model_parallel_size=layout.pipeline,
        params_dtype=dtype,
        pipeline_dtype=dtype,
        bf16=dtype is torch.bfloat16,
        fp16=dtype is torch.float16,
        use_cpu_initialization=not torch.cuda.is_available(),
        perform_initialization=False,
        persist_layer_norm=False,
        gradient_accumulation_fusion=False,
        bias_activation_fusion=False,
        bias_dropout_fusion=False,
        masked_softmax_fusion=False,
        apply_rope_fusion=False,
        **further,
    )
