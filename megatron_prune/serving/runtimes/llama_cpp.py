"""llama.cpp (of 2026-10), its converter and what reads GGUF; Ollama and LM Studio run the same."""

from __future__ import annotations

import math
from typing import Callable

from megatron_prune.arch.model import ModelConfig
from megatron_prune.families.nemotron_nas import NEMOTRON_NAS, factor_of
from megatron_prune.families.per_layer import PER_LAYER
from megatron_prune.serving.runtime import REFUSED, RUNTIMES, SILENT, Rule, Runtime

_NAS = (NEMOTRON_NAS.name,)
_PERIOD = 6
"""Gemma 3: every sixth layer sees everything."""
_BIGGEST, _LAYERS = "Gemma 3 27B", 62


def _other_width(layer: ModelConfig) -> str:
    heads = layer.units("head")
    if layer.hidden_size == heads * layer.kv_channels:
        return ""
    return f"hidden_size {layer.hidden_size}, not {heads} heads × {layer.kv_channels}"


def _other_head_dim(layer: ModelConfig) -> str:
    hidden, heads, head_dim = layer.hidden_size, layer.units("head"), layer.kv_channels
    return "" if not heads or hidden // heads == head_dim else f"head_dim {head_dim}, not {hidden} // {heads} heads"


def _scaled(kind: str) -> Callable[[ModelConfig], str]:
    def found(layer: ModelConfig) -> str:
        scaling = layer.uniform("rope_scaling")
        return f"rotary scaling {kind}" if scaling and scaling.kind == kind else ""

    return found


def _window(layer: ModelConfig) -> str:
    window = layer.uniform("sliding_window")
    return f"a window of {window} tokens" if window else ""


def _other_pattern(config: ModelConfig) -> str:
    layers = [config.of_layer(layer).uniform("sliding_window") is None for layer in range(config.num_layers)]
    odd = [layer for layer, sees_all in enumerate(layers) if sees_all != (layer % _PERIOD == _PERIOD - 1)]
    return f"layer {odd[0]} {'without' if layers[odd[0]] else 'with'} a window" if odd else ""


def _other_scale(config: ModelConfig) -> str:
    heads, inside = max(config.each("num_attention_heads")), config.kv_channels
    taken = (config.hidden_size // heads if config.num_layers == _LAYERS else inside) ** -0.5
    scales = {inside**-0.5 if scale is None else scale for scale in config.each("softmax_scale")}
    other = [scale for scale in scales if not math.isclose(scale, taken, rel_tol=1e-6)]
    return f"attention scaled by {other[0]:.6g}, not {taken:.6g}" if other else ""


def _width(layer: ModelConfig) -> str:
    size = layer.units("ffn")
    return "" if not size or factor_of(size, layer.hidden_size) else f"ffn_hidden_size {size}, no multiple of 256"


def _no_mlp(layer: ModelConfig) -> str:
    return "attention without a feed-forward block, which is left out" if not layer.units("ffn") else ""


RUNTIMES.register("llamacpp")(
    Runtime(
        title="llama.cpp",
        rules=(
            Rule(of=(PER_LAYER.name,), what="all models", then=REFUSED, found=lambda layer: "a class that it does not have"),
            Rule(of=("qwen2",), what="hidden that is not heads × head_dim", then=REFUSED, found=_other_width),
            Rule(of=("qwen2", "qwen3"), what="rotary scaling llama3", then=SILENT, found=_scaled("llama3")),
            Rule(of=("mistral",), what="a sliding window, on longer texts", then=SILENT, found=_window),
            Rule(
                of=("gemma3_text",),
                what="windows other than in five layers and none in the sixth, in turn",
                then=SILENT,
                found=_other_pattern,
                whole=True,
            ),
            Rule(
                of=("gemma3_text",),
                what=f"scores scaled otherwise than by 1 / √head_dim (of {_LAYERS} layers, {_BIGGEST}: 1 / √(hidden // heads))",
                then=SILENT,
                found=_other_scale,
                whole=True,
            ),
            Rule(of=_NAS, what="head_dim that is not hidden // heads", then=REFUSED, found=_other_head_dim),
            Rule(of=_NAS, what="a width that is no multiple of 256", then=REFUSED, found=_width),
            Rule(of=_NAS, what="attention in a layer without a feed-forward block", then=SILENT, found=_no_mlp),
            Rule(of=_NAS, what="rotary scaling linear", then=SILENT, found=_scaled("linear")),
        ),
    )
)
