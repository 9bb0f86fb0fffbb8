"""Gemma 3, text (arXiv 2503.19786): norms before and after both blocks, local and global layers, GeGLU, a scaled embedding."""

from __future__ import annotations

from typing import Any

from megatron_prune.arch.model import ModelConfig, check_value
from megatron_prune.families import local_global
from megatron_prune.families.entries import Entries
from megatron_prune.families.family import FAMILIES, NAMES, Family

_LAYER = "model.layers.{layer}."
_SCALAR = "query_pre_attn_scalar"


def _read_scale(hf: dict[str, Any]) -> dict[str, float]:
    check_value("int", hf[_SCALAR], f"config.json: {_SCALAR}")
    return {"softmax_scale": hf[_SCALAR] ** -0.5}


def _write_scale(config: ModelConfig) -> dict[str, int]:
    scale = config.softmax_scale
    return {_SCALAR: config.kv_channels if scale is None else round(scale**-2)}


FAMILIES.register("gemma3_text")(
    Family(
        name="gemma3_text",
        architecture="Gemma3ForCausalLM",
        names={
            **NAMES,
            "q_norm": _LAYER + "self_attn.q_norm.weight",
            "k_norm": _LAYER + "self_attn.k_norm.weight",
            "o_norm": _LAYER + "post_attention_layernorm.weight",
            "post_norm": _LAYER + "pre_feedforward_layernorm.weight",
            "down_norm": _LAYER + "post_feedforward_layernorm.weight",
        },
        defaults={
            **local_global.DEFAULTS,
            "rms_norm_eps": 1e-6,
            "max_position_embeddings": 131072,
            "tie_word_embeddings": True,
            "num_key_value_heads": 4,
            "head_dim": 256,
            "pad_token_id": 0,
            _SCALAR: 256,
        },
        traits={
            "qk_norm": True,
            "after_norms": True,
            "zero_centered_norms": True,
            "activation": "gelu_tanh",
            "scaled_embedding": True,
        },
        entries=(
            local_global.LOCAL_AND_GLOBAL,
            Entries(fields=("softmax_scale",), keys=(_SCALAR,), read=_read_scale, write=_write_scale),
        ),
        fixed={
            "hidden_activation": ("gelu_pytorch_tanh",),
            "attn_logit_softcapping": (None,),
            "final_logit_softcapping": (None,),
            "use_bidirectional_attention": (False, None),
        },
        idle={"hidden_act": (str, type(None))},
        stated={"hidden_activation": "gelu_pytorch_tanh"},
        heads_divide_hidden=True,
        needs_bos=True,
    )
)
