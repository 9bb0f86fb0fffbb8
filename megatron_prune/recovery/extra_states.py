"""The objects that Transformer Engine's layers look for, beside those that megatron-core's local layers write."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from megatron.core.dist_checkpointing.mapping import ShardedObject

from megatron_prune.arch.model import ModelConfig
from megatron_prune.checkpoint.extra_states import FINAL_NORM, LOCAL, transformer_engine


def missing_extra_states(model: dict[str, Any], config: ModelConfig) -> dict[str, ShardedObject]:
    """What a checkpoint of a local model lacks for one of Transformer Engine's, as ``dist_checkpointing`` wants it.

    Args:
        model: the local model's own description; one of adapters alone lacks nothing.
    """
    found: dict[str, ShardedObject] = {}
    for name, part in model.items():
        if name.endswith(LOCAL[0]):
            for other in transformer_engine(config):
                beside = replace(part, key=part.key.replace(LOCAL[0], other))
                found[name.replace(LOCAL[0], other)] = beside
        if part.key == FINAL_NORM.replace("_extra_state", "weight"):
            found[FINAL_NORM] = ShardedObject(FINAL_NORM, None, (1,), (0,), part.replica_id)
    return {name: part for name, part in found.items() if name not in model}
