"""Qwen2 and Qwen2.5 (arXiv 2407.10671, 2412.15115): Llama with biases on the query, key and value projections."""

from megatron_prune.families.family import FAMILIES, NAMES, QKV_BIASES, Family
from megatron_prune.families.rope import ROTARY
from megatron_prune.families.windows import WINDOWS_OF_SOME

FAMILIES.register("qwen2")(
    Family(
        name="qwen2",
        architecture="Qwen2ForCausalLM",
        names={**NAMES, **QKV_BIASES},
        defaults={
            "rms_norm_eps": 1e-6,
            "max_position_embeddings": 32768,
            "tie_word_embeddings": False,
            "num_key_value_heads": 32,
        },
        traits={"qkv_bias": True},
        entries=(ROTARY, WINDOWS_OF_SOME),
    )
)
