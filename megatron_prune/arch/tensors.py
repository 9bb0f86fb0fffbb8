"""The tensors of a model by role: what every format, metric and cut calls them.

A role tensor is always full and unfused, laid out as in Hugging Face (``[out, in]``). Its dimensions are of spaces, and a
space names the axis that owns it: ``hidden``, ``ffn``, ``head`` (query heads × head_dim), ``kv_head``, ``vocab``;
``head_dim`` is never cut. Roles inside the layers are those of their blocks (``arch/blocks/``).
"""

from __future__ import annotations

import functools
from math import prod
from typing import NamedTuple

from megatron_prune.arch.blocks.block import OUTER, spaces
from megatron_prune.arch.model import ModelConfig


class TensorId(NamedTuple):
    """One tensor of a model: a role, and the 0-based layer it is in (``None`` outside the layers)."""

    role: str
    layer: int | None = None

    def __str__(self) -> str:
        return self.role if self.layer is None else f"layer {self.layer} {self.role}"


EMBEDDING, FINAL_NORM, HEAD = (TensorId(role.name) for role in OUTER)


@functools.lru_cache(maxsize=1 << 14)
def layer_roles(config: ModelConfig) -> tuple[str, ...]:
    """Roles that a layer has, in order of use.

    Args:
        config: of the layer (:meth:`ModelConfig.of_layer`), or of a model whose layers are alike.
    """
    return tuple(role.name for kind in config.kinds for role in config.roles(kind))


def tensor_ids(config: ModelConfig) -> list[TensorId]:
    """Every tensor of the model, embedding first, output layer last (none when it is tied)."""
    inner = [TensorId(role, layer) for layer in range(config.num_layers) for role in layer_roles(config.of_layer(layer))]
    return [EMBEDDING, *inner, FINAL_NORM, *([] if config.tie_embeddings else [HEAD])]


def head_of(config: ModelConfig) -> TensorId:
    """The matrix that makes logits: the embedding, where the two are tied."""
    return EMBEDDING if config.tie_embeddings else HEAD


def tensor_shape(role: str, config: ModelConfig) -> tuple[int, ...]:
    """Full shape of a role tensor of a layer (or outside the layers), in elements; ``config`` as for :func:`layer_roles`."""
    return tuple(config.size(space) for space in spaces(role))


def full_shape(tensor: TensorId, config: ModelConfig) -> tuple[int, ...]:
    """Full shape of a tensor of the model, in elements."""
    return tensor_shape(tensor.role, config.of_layer(tensor.layer))


def offset_of(role: str, config: ModelConfig) -> float:
    """What is added to a role tensor's values before they multiply: 1 of norms that count from one, else 0."""
    return config.norm_offset if spaces(role) in (("hidden",), ("head_dim",)) else 0.0


def parameter_count(config: ModelConfig) -> int:
    """Parameters of the model as stored: tied embeddings once, no vocabulary padding."""
    return sum(prod(full_shape(tensor, config)) for tensor in tensor_ids(config))
