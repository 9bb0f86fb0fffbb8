"""Qwen3 dense (arXiv 2505.09388): no QKV bias, an RMSNorm on every query and key head, a free head dimension."""

from megatron_prune.families.family import FAMILIES, NAMES, Family
from megatron_prune.families.rope import ROTARY
from megatron_prune.families.windows import WINDOWS_OF_SOME

FAMILIES.register("qwen3")(
    Family(
        name="qwen3",
        architecture="Qwen3ForCausalLM",
        names={
            **NAMES,
            "q_norm": "model.layers.{layer}.self_attn.q_norm.weight",
            "k_norm": "model.layers.{layer}.self_attn.k_norm.weight",
        },
        defaults={
            "rms_norm_eps": 1e-6,
            "max_position_embeddings": 32768,
            "tie_word_embeddings": False,
            "num_key_value_heads": 32,
            "head_dim": 128,
        },
        traits={"qk_norm": True},
        entries=(ROTARY, WINDOWS_OF_SOME),
    )
)
