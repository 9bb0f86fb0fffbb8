"""vLLM 0.32: classes of its own for stock families and ``nemotron-nas``, transformers' modules for ``per_layer_config``."""

from __future__ import annotations

from megatron_prune.arch.model import ModelConfig
from megatron_prune.families.per_layer import PER_LAYER
from megatron_prune.serving.runtime import REFUSED, RUNTIMES, Rule, Runtime


def _other_head_dim(layer: ModelConfig) -> str:
    """``vllm/model_executor/models/qwen2.py`` divides and passes ``head_dim`` over."""
    hidden, heads, head_dim = layer.hidden_size, layer.units("head"), layer.kv_channels
    return "" if hidden // heads == head_dim else f"head_dim {head_dim}, not {hidden} // {heads} heads"


def _no_attention(layer: ModelConfig) -> str:
    return "" if layer.units("head") else "no attention"


RUNTIMES.register("vllm")(
    Runtime(
        title="vLLM",
        rules=(
            Rule(of=("qwen2",), what="head_dim that is not hidden // heads", then=REFUSED, found=_other_head_dim),
            Rule(of=(PER_LAYER.name,), what="a layer without attention", then=REFUSED, found=_no_attention),
        ),
    )
)
