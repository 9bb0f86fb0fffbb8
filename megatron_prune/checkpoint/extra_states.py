"""The empty objects that Megatron's layers look for beside their weights when they are loaded strictly.

Transformer Engine's modules keep the state of FP8 in an ``_extra_state``: its linear layers and its attention always, its
norms from 1.13 on. Without FP8 it is ``None``. megatron-core's local linear layers have one too, always ``None``; its local
norms and attention have none.

In ``torch_dist`` whatever some version asks for is written, since an object that nobody asks for does no harm there. A rank's
file of the legacy layout holds those of one kind of layers exactly: there both a missing and an unexpected one count.
"""

from __future__ import annotations

from megatron_prune.arch.model import ModelConfig

FINAL_NORM = "decoder.final_layernorm._extra_state"
"""That of the norm after the last layer (Transformer Engine's)."""

LOCAL = (
    "self_attention.linear_qkv._extra_state",
    "self_attention.linear_proj._extra_state",
    "mlp.linear_fc1._extra_state",
    "mlp.linear_fc2._extra_state",
)
"""Those inside one of megatron-core's local layers."""

_QK_NORMS = ("self_attention.q_layernorm._extra_state", "self_attention.k_layernorm._extra_state")


def transformer_engine(config: ModelConfig) -> tuple[str, ...]:
    """Those inside a layer of Transformer Engine's modules, by their names there."""
    return (*LOCAL, "self_attention.core_attention._extra_state", *(_QK_NORMS if config.qk_norm else ()))
