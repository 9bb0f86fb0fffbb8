"""The ``args`` namespace that Megatron-LM stores in its checkpoints, of our configuration (read by ``description.py``).

Megatron-LM compares or adopts these at load (``check_checkpoint_args``, ``load_args_from_checkpoint``), so a checkpoint
of another shape needs new ones; ``kv_channels`` must be explicit, since hidden size / heads no longer gives it.
"""

from __future__ import annotations

from argparse import Namespace
from dataclasses import replace

import torch

from megatron_prune.arch.model import ModelConfig
from megatron_prune.arch.sharding import ParallelLayout
from megatron_prune.checkpoint import gemma3_args, heterogeneous
from megatron_prune.checkpoint.options import TRANSFORMER_IMPLS


def megatron_args(
    config: ModelConfig,
    layout: ParallelLayout,
    dtype: torch.dtype,
    tokenizer: str | None,
    transformer_impl: str = TRANSFORMER_IMPLS[0],
) -> Namespace:
    """``args`` for a weights-only checkpoint of ``config``, under Megatron-LM's names.

    Args:
        tokenizer: directory of the tokenizer, where there is one.
    """
    return Namespace(**_common(config, layout, dtype, tokenizer, transformer_impl) | gemma3_args.write(config))


def _common(
    config: ModelConfig, layout: ParallelLayout, dtype: torch.dtype, tokenizer: str | None, transformer_impl: str
) -> dict:
    most = lambda field: max(config.each(field))
    scaling = config.each("rope_scaling")[0]
    base = config.first_rotary_base
    window = config.each("sliding_window")[0]
    return dict(
        num_layers=config.num_layers,
        hidden_size=config.hidden_size,
        ffn_hidden_size=most("ffn_hidden_size"),
        num_attention_heads=most("num_attention_heads"),
        group_query_attention=config.each("num_query_groups") != config.each("num_attention_heads"),
        num_query_groups=most("num_query_groups"),
        heterogeneous_layers_config_encoded_json=heterogeneous.encoded(config),
        kv_channels=config.kv_channels,
        seq_length=config.max_position_embeddings,
        max_position_embeddings=config.max_position_embeddings,
        position_embedding_type="rope",
        add_position_embedding=False,
        use_rotary_position_embeddings=True,
        rotary_base=int(base) if float(base).is_integer() else base,
        rotary_percent=1.0,
        rotary_interleaved=False,
        rotary_seq_len_interpolation_factor=scaling.factor if scaling and scaling.kind == "linear" else None,
        use_rope_scaling=bool(scaling and scaling.kind == "llama3"),
        rope_scaling_factor=scaling.factor if scaling and scaling.kind == "llama3" else 8.0,
        window_size=None if window is None else (window - 1, 0),
        normalization="RMSNorm",
        norm_epsilon=config.norm_epsilon,
        layernorm_epsilon=config.norm_epsilon,
        apply_layernorm_1p=False,
        swiglu=True,
        add_bias_linear=False,
        add_qkv_bias=config.qkv_bias,
        qk_layernorm=config.qk_norm,
        untie_embeddings_and_output_weights=not config.tie_embeddings,
        vocab_size=config.vocab_size,
        padded_vocab_size=layout.padded_vocab(config.vocab_size),
        make_vocab_size_divisible_by=layout.vocab_divisible_by,
        tokenizer_type="HuggingFaceTokenizer",
        tokenizer_model=tokenizer,
        tensor_model_parallel_size=layout.tensor,
        pipeline_model_parallel_size=layout.pipeline,
        virtual_pipeline_model_parallel_size=None,
        expert_model_parallel_size=1,
        num_experts=None,
        params_dtype=dtype,
        bf16=dtype is torch.bfloat16,
        fp16=dtype is torch.float16,
        use_mcore_models=True,
        transformer_impl=transformer_impl,
        hidden_dropout=0.0,
        attention_dropout=0.0,
        no_save_optim=True,
        no_save_rng=True,
        iteration=0,
        consumed_train_samples=0,
        consumed_valid_samples=0,
        **_ABSENT,
    )


_ABSENT = {
    **dict.fromkeys(
        "multi_latent_attention squared_relu qk_l2_norm init_method_xavier_uniform fp16_lm_cross_entropy moe_grouped_gemm "
        "moe_use_legacy_grouped_gemm is_hybrid_model use_legacy_models fp8_param_gather bias_gelu_fusion no_persist_layer_norm "
        "overlap_p2p_comm init_model_with_meta_device".split(),
        False,
    ),
    **dict.fromkeys(
        "spec mtp_num_layers heterogeneous_layers_config_path decoder_first_pipeline_num_layers "
        "decoder_last_pipeline_num_layers".split()
    ),
    "bias_swiglu_fusion": True,
    "config_logger_dir": "",
    "cp_comm_type": ["p2p"],
}
"""What Megatron-Bridge looks for in the ``args`` of a checkpoint without ``run_config.yaml``, at Megatron-LM's defaults."""


def padded_as_stored(layout: ParallelLayout, vocab_size: int, padded: int) -> ParallelLayout:
    """``layout`` with a padding rule that makes ``padded`` rows of ``vocab_size``, however the writer came to them."""
    if layout.padded_vocab(vocab_size) == padded:
        return layout
    return replace(layout, vocab_divisible_by=max(1, padded // layout.tensor))
