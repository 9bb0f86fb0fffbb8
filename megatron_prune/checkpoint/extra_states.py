"""The empty objects that Megatron's layers look for beside their weights when they are loaded strictly.

Transformer Engine's modules keep the state of FP8 in an ``_extra_state``: its linear layers and its attention always, its
norms from 1.13 on. Without FP8 it is ``None``. megatron-core's local linear layers have one too, always ``None``; its local
norms and attention have none.

In ``torch_dist`` whatever some version asks for is written, since an object that nobody asks for does no harm there. A rank's
file of the legacy layout holds those of one kind of layers exactly: there both a missing and an unexpected one count.
"""

from __future__ import annotations

from megatron_prune.arch.blocks.block import BlockKind
from megatron_prune.arch.model import ModelConfig

FINAL_NORM = "decoder.final_layernorm._extra_state"
"""That of the norm after the last layer (Transformer Engine's)."""

_NAME = "{}._extra_state".format


def local(kind: BlockKind) -> list[str]:
    """Those inside a block of megatron-core's local modules: of its matrices."""
    return [_NAME(tensor.module) for tensor in kind.megatron if set(tensor.roles) & set(kind.matrices)]


def transformer_engine(kind: BlockKind, config: ModelConfig) -> list[str]:
    """Those inside a block of Transformer Engine's modules, by their names there: of matrices, attention and norms inside it."""
    holder = kind.tensor_of(kind.writer).module.rpartition(".")[0]
    attention = [f"{holder}.core_attention"] if kind.mixes_tokens else []
    inside = [role.name for role in config.roles(kind) if role.spaces == ("head_dim",) or role.name == kind.after_norm]
    return [*local(kind), *map(_NAME, [*attention, *(kind.tensor_of(role).module for role in inside)])]


def of_layer(config: ModelConfig, *, local_names: bool) -> list[str]:
    """Those of a layer."""
    return [name for kind in config.kinds for name in (local(kind) if local_names else transformer_engine(kind, config))]
