"""Llama 1, 2 and 3.x (arXiv 2302.13971, 2307.09288, 2407.21783), and models that ship as Llama (SmolLM2, Yi)."""

from megatron_prune.families.family import FAMILIES, Family

FAMILIES.register("llama")(
    Family(
        name="llama",
        architecture="LlamaForCausalLM",
        defaults={"rms_norm_eps": 1e-6, "max_position_embeddings": 2048, "tie_word_embeddings": False},
        heads_divide_hidden=True,
    )
)
