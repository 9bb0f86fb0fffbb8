"""The tensors of a model by role: what every format, metric and cut calls them.

A role tensor is always full and unfused, laid out as in Hugging Face (``[out, in]``). Its dimensions carry labels, and a
label names the axis that owns them: ``hidden``, ``ffn``, ``head`` (query heads × head_dim), ``kv_head``, ``vocab``;
``head_dim`` is never cut.
"""

from __future__ import annotations

from math import prod
from typing import NamedTuple

from megatron_prune.arch.model import ModelConfig


class TensorId(NamedTuple):
    """One tensor of a model: a role, and the 0-based layer it is in (``None`` outside the layers)."""

    role: str
    layer: int | None = None

    def __str__(self) -> str:
        return self.role if self.layer is None else f"layer {self.layer} {self.role}"


OUTER_ROLES: dict[str, tuple[str, ...]] = {
    "embedding": ("vocab", "hidden"),
    "final_norm": ("hidden",),
    "output": ("vocab", "hidden"),
}
LAYER_ROLES: dict[str, tuple[str, ...]] = {
    "input_norm": ("hidden",),
    "q": ("head", "hidden"),
    "k": ("kv_head", "hidden"),
    "v": ("kv_head", "hidden"),
    "q_bias": ("head",),
    "k_bias": ("kv_head",),
    "v_bias": ("kv_head",),
    "q_norm": ("head_dim",),
    "k_norm": ("head_dim",),
    "o": ("hidden", "head"),
    "post_norm": ("hidden",),
    "gate": ("ffn", "hidden"),
    "up": ("ffn", "hidden"),
    "down": ("hidden", "ffn"),
}
ROLES = {**OUTER_ROLES, **LAYER_ROLES}


def layer_roles(config: ModelConfig) -> list[str]:
    """Roles that every layer of this model has, in order of use."""
    absent = set()
    if not config.qkv_bias:
        absent |= {"q_bias", "k_bias", "v_bias"}
    if not config.qk_norm:
        absent |= {"q_norm", "k_norm"}
    return [role for role in LAYER_ROLES if role not in absent]


def tensor_ids(config: ModelConfig) -> list[TensorId]:
    """Every tensor of the model, embedding first, output layer last (none when it is tied)."""
    inner = [TensorId(role, layer) for layer in range(config.num_layers) for role in layer_roles(config)]
    outer = [TensorId("final_norm")] + ([] if config.tie_embeddings else [TensorId("output")])
    return [TensorId("embedding"), *inner, *outer]


def tensor_shape(role: str, config: ModelConfig) -> tuple[int, ...]:
    """Full shape of a role tensor, in elements."""
    return tuple(config.dims[label] for label in ROLES[role])


def parameter_count(config: ModelConfig) -> int:
    """Parameters of the model as stored: tied embeddings once, no vocabulary padding."""
    return sum(prod(tensor_shape(tensor.role, config)) for tensor in tensor_ids(config))
