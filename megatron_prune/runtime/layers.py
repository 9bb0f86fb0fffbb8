"""The layer spec: Transformer Engine's where it can be imported and there is CUDA, else megatron-core's local layers.

Two modules of the local spec are replaced. Its attention materialises the scores and forks an RNG state that exists on
CUDA only; its RMSNorm refuses sequence parallelism.
"""

from __future__ import annotations

import importlib.util

import torch
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec, get_gpt_layer_with_transformer_engine_spec
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention


def has_transformer_engine() -> bool:
    """Whether Transformer Engine's layers can be used here."""
    return torch.cuda.is_available() and importlib.util.find_spec("transformer_engine") is not None


def layer_spec(config: TransformerConfig) -> ModuleSpec:
    """The spec of one decoder layer."""
    if has_transformer_engine():
        return get_gpt_layer_with_transformer_engine_spec(qk_layernorm=config.qk_layernorm)
    spec = get_gpt_layer_local_spec(qk_layernorm=config.qk_layernorm, normalization="RMSNorm")
    parts, attention = spec.submodules, spec.submodules.self_attention.submodules
    parts.input_layernorm = parts.pre_mlp_layernorm = RMSNorm
    attention.core_attention = SdpaAttention
    if config.qk_layernorm:
        attention.q_layernorm = attention.k_layernorm = RMSNorm
    return spec


class RMSNorm(nn.RMSNorm):
    """RMSNorm (Zhang & Sennrich 2019, arXiv 1910.07467) under megatron-core's constructor; weight [hidden_size]."""

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float = 1e-5, **_: object):
        super().__init__(hidden_size, eps=eps, dtype=config.params_dtype)
        self.weight.sequence_parallel = config.sequence_parallel


class SdpaAttention(nn.Module):
    """Causal grouped-query attention through torch's ``scaled_dot_product_attention``, without dropout."""

    def __init__(self, config: TransformerConfig, *_: object, softmax_scale: float | None = None, **__: object):
        super().__init__()
        self._scale = softmax_scale
        self._window = None if config.window_size is None else config.window_size[0] + 1

    def forward(self, query: Tensor, key: Tensor, value: Tensor, *_: object, **__: object) -> Tensor:
        """Attend.

        Args:
            query: [tokens, batch, heads, head_dim], this rank's heads.
            key, value: [tokens, batch, KV groups, head_dim].

        Returns:
            [tokens, batch, heads × head_dim].
        """
        tokens, batch = query.shape[:2]
        query, key, value = (part.permute(1, 2, 0, 3) for part in (query, key, value))
        mask = None
        if self._window is not None and self._window < tokens:
            mask = torch.ones(tokens, tokens, dtype=torch.bool, device=query.device).tril().triu(1 - self._window)
        grouped = query.shape[1] != key.shape[1]
        context = scaled_dot_product_attention(
            query, key, value, attn_mask=mask, is_causal=mask is None, scale=self._scale, enable_gqa=grouped
        )
        return context.permute(2, 0, 1, 3).reshape(tokens, batch, -1)
