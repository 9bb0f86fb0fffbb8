"""Grouped-query attention (Ainslie et al. 2023, arXiv 2305.13245): a unit is a query head, or a KV group with all its heads.

Megatron fuses q, k and v by KV group: n·d rows of q, d of k, d of v (n query heads of d features share a group).
"""

from megatron_prune.arch.blocks.block import BLOCKS, BlockKind, MegatronTensor, Role, replicated

_QKV, _PROJ = "self_attention.linear_qkv.", "self_attention.linear_proj."
_Q_NORM, _K_NORM = "self_attention.q_layernorm.weight", "self_attention.k_layernorm.weight"


def _fused(kind: str, *roles: str) -> MegatronTensor:
    name = _QKV + kind
    return MegatronTensor(name=name, local_name=name, roles=roles, split="rows", axis="kv_head", by_group=True)


BLOCKS.register("attention")(
    BlockKind(
        name="attention",
        half="attention",
        roles=(
            Role("input_norm", ("hidden",)),
            Role("q", ("head", "hidden")),
            Role("k", ("kv_head", "hidden")),
            Role("v", ("kv_head", "hidden")),
            Role("q_bias", ("head",), "qkv_bias"),
            Role("k_bias", ("kv_head",), "qkv_bias"),
            Role("v_bias", ("kv_head",), "qkv_bias"),
            Role("q_norm", ("head_dim",), "qk_norm"),
            Role("k_norm", ("head_dim",), "qk_norm"),
            Role("o", ("hidden", "head")),
            Role("o_norm", ("hidden",), "after_norms"),
        ),
        norm="input_norm",
        readers=("q", "k", "v"),
        inside="context",
        inside_space="head",
        writer="o",
        after_norm="o_norm",
        axes=("head", "kv_head"),
        mixes_tokens=True,
        megatron=(
            replicated(_QKV + "layer_norm_weight", "input_layernorm.weight", "input_norm"),
            _fused("weight", "q", "k", "v"),
            _fused("bias", "q_bias", "k_bias", "v_bias"),
            replicated(_Q_NORM, _Q_NORM, "q_norm"),
            replicated(_K_NORM, _K_NORM, "k_norm"),
            MegatronTensor(name=_PROJ + "weight", local_name=_PROJ + "weight", roles=("o",), split="cols", axis="kv_head"),
            replicated(_PROJ + "post_layernorm.weight", _PROJ + "post_layernorm.weight", "o_norm"),
        ),
    )
)
