"""Whether tensor-parallel ranks of a runtime can share a model, as vLLM 0.32 shares it."""

from __future__ import annotations

from megatron_prune.arch.model import ModelConfig
from megatron_prune.serving.runtime import REFUSED, Rule

PADDED = 64
"""Rows of the vocabulary are padded to a multiple of this (``vllm/model_executor/layers/vocab_parallel_embedding.py``)."""


def rules(ranks: int) -> tuple[Rule, ...]:
    """What of a model ``ranks`` cannot share, of any class."""

    def heads(layer: ModelConfig) -> str:
        return _undivided("num_attention_heads", layer.units("head"))

    def groups(layer: ModelConfig) -> str:
        number = layer.units("kv_head")
        if not number or (number % ranks == 0 if number >= ranks else ranks % number == 0):
            return ""
        return f"num_query_groups {number}, which neither divides by {ranks} nor divides {ranks}"

    def width(layer: ModelConfig) -> str:
        return _undivided("ffn_hidden_size", layer.units("ffn"))

    def vocabulary(config: ModelConfig) -> str:
        rows = -(-config.vocab_size // PADDED) * PADDED
        return f"vocab_size {config.vocab_size}, {rows} with padding, which does not divide by {ranks}" if rows % ranks else ""

    def _undivided(field: str, size: int) -> str:
        return f"{field} {size}, which does not divide by {ranks}" if size % ranks else ""

    common = {"of": (), "what": "", "then": REFUSED}
    by_layer = (Rule(**common, found=found) for found in (heads, groups, width))
    return (*by_layer, Rule(**common, found=vocabulary, whole=True))


def problems(config: ModelConfig, ranks: int, *, of_layers: bool = False) -> list[str]:
    """What of a model ``ranks`` cannot share, in words.

    Args:
        of_layers: look only at what single layers are.
    """
    found = (rule.problem(config) for rule in rules(ranks) if not (of_layers and rule.whole))
    return [f"tp={ranks}: {word}" for word in found if word]
