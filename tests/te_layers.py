"""Layers that ask a checkpoint for what Transformer Engine's ask for, which cannot be installed without CUDA.

Names and ``_extra_state`` are those of ``get_gpt_layer_with_transformer_engine_spec`` with Transformer Engine from 1.13 on and
megatron-core to 0.14 (later ones ask for less: attention's object is left out). Loading is as strict as there: a missing
object is an error, and so is one that is not empty. They are loaded, never run.
"""

from __future__ import annotations

import torch
from megatron.core.tensor_parallel.layers import ColumnParallelLinear, RowParallelLinear
from megatron.core.transformer.attention import SelfAttention, SelfAttentionSubmodules
from megatron.core.transformer.dot_product_attention import DotProductAttention
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.identity_op import IdentityOp
from megatron.core.transformer.mlp import MLP, MLPSubmodules
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules
from megatron.core.transformer.transformer_layer import TransformerLayer, TransformerLayerSubmodules


class _Strict:
    def get_extra_state(self) -> None:
        return None

    def set_extra_state(self, state: object) -> None:
        assert state is None, state

    def forgive_nothing(self) -> None:
        """megatron-core's linear layers put a missing ``_extra_state`` in before they are loaded."""
        self._load_state_dict_pre_hooks.clear()


class Norm(_Strict, torch.nn.RMSNorm):
    def __init__(self, config, hidden_size: int, eps: float = 1e-5, **_):
        super().__init__(hidden_size, eps)


class NormAndColumns(_Strict, ColumnParallelLinear):
    def __init__(self, input_size: int, *args, **kwargs):
        super().__init__(input_size, *args, **kwargs)
        self.layer_norm_weight = torch.nn.Parameter(torch.empty(input_size))
        self.forgive_nothing()


class Rows(_Strict, RowParallelLinear):
    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.forgive_nothing()


class Attention(_Strict, DotProductAttention):
    sharded_state_dict = MegatronModule.sharded_state_dict  # as to 0.14: with the object


def layers(num_layers: int, qk_layernorm: bool) -> TransformerBlockSubmodules:
    """Those of a stage, as ``GPTModel`` wants them."""
    qk_norm = Norm if qk_layernorm else IdentityOp
    attention = SelfAttentionSubmodules(
        linear_qkv=NormAndColumns, core_attention=Attention, linear_proj=Rows, q_layernorm=qk_norm, k_layernorm=qk_norm
    )
    parts = TransformerLayerSubmodules(
        self_attention=ModuleSpec(SelfAttention, params={"attn_mask_type": AttnMaskType.causal}, submodules=attention),
        mlp=ModuleSpec(MLP, submodules=MLPSubmodules(linear_fc1=NormAndColumns, linear_fc2=Rows)),
    )
    layer = ModuleSpec(TransformerLayer, submodules=parts)
    return TransformerBlockSubmodules(layer_specs=[layer] * num_layers, layer_norm=Norm)
