"""Mistral (arXiv 2310.06825): Llama's architecture with an optional sliding window and a free head dimension."""

from megatron_prune.families.family import FAMILIES, Family
from megatron_prune.families.rope import ROTARY
from megatron_prune.families.windows import ONE_WINDOW

FAMILIES.register("mistral")(
    Family(
        name="mistral",
        architecture="MistralForCausalLM",
        defaults={
            "rms_norm_eps": 1e-6,
            "max_position_embeddings": 131072,
            "tie_word_embeddings": False,
            "num_key_value_heads": 8,
        },
        entries=(ROTARY, ONE_WINDOW),
    )
)
