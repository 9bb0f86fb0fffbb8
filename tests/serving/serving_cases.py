"""Tiny models of every class and cut that runtimes are tried on: in each the class's own sizes, or something that a rule is about."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any, NamedTuple

import tiny
import torch
from per_layer import write_model

from megatron_prune.arch.model import ModelConfig, RopeScaling
from megatron_prune.families.choice import choose_family
from megatron_prune.families.family import FAMILIES, Family
from megatron_prune.families.nemotron_nas import NEMOTRON_NAS
from megatron_prune.serving.runtime import Written

LLAMA3 = RopeScaling(kind="llama3", factor=8.0, original_max_position_embeddings=64)
LINEAR = RopeScaling(kind="linear", factor=4.0)
TOKENS = (11, 23, 77, 102, 290, 3, 250, 5, 6, 7, 8, 100, 31, 45, 99, 10, 12, 200, 201, 202)
"""A text that is longer than the windows."""
FULL_SIZE = 6
"""Gemma 3: every sixth layer sees everything."""


class Case(NamedTuple):
    """A family, what it is written as, and what its model has otherwise than :func:`model`."""

    family: str
    target: str | None
    changes: dict[str, Any]

    @property
    def written(self) -> Written:
        config = self.config
        return Written(config, *self.as_family(config).written_as(config, None))

    @property
    def config(self) -> ModelConfig:
        return model(self.family, **self.changes)

    def as_family(self, config: ModelConfig) -> Family:
        return choose_family(FAMILIES.get(self.family), self.target, config)


def model(family: str, **changes: Any) -> ModelConfig:
    """4 layers (Gemma 3: 6), hidden 128, 4 heads of 32 in 2 groups, ffn 256."""
    config = FAMILIES.get(family).model_config(tiny.tiny_config(family).to_dict())
    sizes = {
        "hidden_size": 128,
        "ffn_hidden_size": 256,
        "num_attention_heads": 4,
        "num_query_groups": 2,
        "kv_channels": 32,
        "vocab_size": 308,
    }
    if family == "gemma3_text":
        layers = changes.get("num_layers", FULL_SIZE)
        sees_all = [layer % FULL_SIZE == FULL_SIZE - 1 for layer in range(layers)]
        sizes |= {"num_layers": layers, "softmax_scale": None, "rope_scaling": None}
        sizes["sliding_window"] = tuple(None if every else 7 for every in sees_all)
        sizes["rotary_base"] = tuple(1e6 if every else 1e4 for every in sees_all)
    return dataclasses.replace(config, **{**sizes, "max_position_embeddings": 256, **changes})


def _cases() -> dict[str, Case]:
    found = {}
    for family in tiny.FAMILIES:
        for name, changes in {
            "whole": {},
            "untied" if family == "gemma3_text" else "tied": {"tie_embeddings": family != "gemma3_text"},
            "ffn": {"ffn_hidden_size": 171},
            "groups": {"num_query_groups": 1},
            "heads": {"num_attention_heads": 2, "num_query_groups": 1},
            "hidden": {"hidden_size": 96 if family in ("llama", "gemma3_text") else 100},
        }.items():
            found[f"{family}-{name}"] = Case(family, None, changes)
    blocks = {"ffn_hidden_size": (256, 0, 256, 256)}
    without = {"num_attention_heads": (4, 4, 0, 4), "num_query_groups": (2, 2, 0, 2)}
    differing = {"ffn_hidden_size": (256, 512, 256, 256)}
    nas = NEMOTRON_NAS.name
    return found | {
        "qwen2-130": Case("qwen2", None, {"hidden_size": 130}),
        "qwen2-as-llama": Case("qwen2", "llama", {}),
        "qwen2-as-llama-heads": Case("qwen2", "llama", {"num_attention_heads": 2, "num_query_groups": 1}),
        "qwen2-as-llama-hidden": Case("qwen2", "llama", {"hidden_size": 96}),
        "qwen2-as-llama-llama3": Case("qwen2", "llama", {"rope_scaling": LLAMA3}),
        **{f"{family}-llama3": Case(family, None, {"rope_scaling": LLAMA3}) for family in ("llama", "mistral", "qwen2", "qwen3")},
        **{f"{family}-linear": Case(family, None, {"rope_scaling": LINEAR}) for family in ("llama", "mistral", "qwen2", "qwen3")},
        "mistral-window": Case("mistral", None, {"sliding_window": 7}),
        "gemma3_text-scale": Case("gemma3_text", None, {"softmax_scale": 24**-0.5}),
        "gemma3_text-linear": Case("gemma3_text", None, {"rope_scaling": (*[None] * 5, LINEAR)}),
        "gemma3_text-dropped": Case(
            "gemma3_text",
            None,
            {"num_layers": 5, "sliding_window": (7, 7, 7, 7, None), "rotary_base": (*[1e4] * 4, 1e6)},
        ),
        "gemma3_text-62": Case("gemma3_text", None, {"num_layers": 62}),
        "gemma3_text-62-heads": Case("gemma3_text", None, {"num_layers": 62, "num_attention_heads": 2, "num_query_groups": 1}),
        **{f"{family}-per-layer-ffn": Case(family, None, {"ffn_hidden_size": (256, 171, 256, 100)}) for family in PER_LAYER},
        "gemma3_text-per-layer-ffn": Case("gemma3_text", None, {"ffn_hidden_size": (256, 171, 256, 100, 256, 256)}),
        "llama-per-layer-groups": Case("llama", None, {"num_query_groups": (2, 1, 4, 2)}),
        "mistral-per-layer-heads": Case("mistral", None, {"num_attention_heads": (4, 2, 4, 6)}),
        "qwen2-per-layer-hidden": Case("qwen2", None, {"num_query_groups": (2, 1, 4, 2), "hidden_size": 100}),
        "qwen2-llama-per-layer": Case("qwen2", "llama-per-layer", {"num_query_groups": (2, 1, 4, 2), "hidden_size": 96}),
        "llama-per-layer-no-mlp": Case("llama", None, blocks),
        "llama-per-layer-no-attention": Case("llama", None, without),
        "nas-groups": Case("llama", nas, {**differing, "num_query_groups": (2, 1, 4, 2)}),
        "nas-odd": Case("llama", nas, {"ffn_hidden_size": (256, 171, 256, 100)}),
        "nas-no-mlp": Case("llama", nas, blocks),
        "nas-no-attention": Case("llama", nas, without),
        "nas-bias": Case("qwen2", nas, differing),
        "nas-heads": Case("llama", nas, {**differing, "num_attention_heads": 2}),
        "nas-linear": Case("llama", nas, {**differing, "rope_scaling": LINEAR}),
    }


PER_LAYER = ("llama", "mistral", "qwen2", "qwen3")
CASES = _cases()


def write(folder: Path, case: Case, tokenizer: Path) -> Path:
    """A case on disk, float32."""
    config = case.config
    return write_model(folder, config, case.as_family(config), beside=tokenizer, dtype=torch.float32)
