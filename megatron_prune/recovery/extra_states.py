"""The objects that Transformer Engine's layers look for, beside those that megatron-core's local layers write."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from megatron.core.dist_checkpointing.mapping import ShardedObject

from megatron_prune.arch.blocks.block import BLOCKS
from megatron_prune.arch.model import ModelConfig
from megatron_prune.checkpoint.extra_states import FINAL_NORM, local, transformer_engine


def missing_extra_states(model: dict[str, Any], config: ModelConfig) -> dict[str, ShardedObject]:
    """What a checkpoint of a local model lacks for one of Transformer Engine's, as ``dist_checkpointing`` wants it.

    Args:
        model: the local model's own description; one of adapters alone lacks nothing.
    """
    found: dict[str, ShardedObject] = {}
    for name, part in model.items():
        for kind in map(BLOCKS.get, BLOCKS.names()):
            first = local(kind)[0]
            for other in transformer_engine(kind, config) if name.endswith(first) else ():
                found[name.replace(first, other)] = replace(part, key=part.key.replace(first, other))
        if part.key == FINAL_NORM.replace("_extra_state", "weight"):
            found[FINAL_NORM] = ShardedObject(FINAL_NORM, None, (1,), (0,), part.replica_id)
    return {name: part for name, part in found.items() if name not in model}
