"""Which stored arguments say what a model computes: Megatron-LM's (0.4 to 0.19), megatron-core's and Megatron-Bridge's.

Every one of their names is understood (``checkpoint/description.py`` reads it), :data:`FIXED` (read at the values given here and
refused at others) or without effect on what trained weights compute: training, parallelism, precision, fusion, data, logging, and
the details of features that are switched on by one of :data:`FIXED`. A name that is none of these came later or from elsewhere: it
is refused unless it says nothing (``None``, false, zero, empty) or the user knows it to be harmless.
"""

from __future__ import annotations

from types import MappingProxyType
from typing import Any, Mapping

from megatron_prune.files.documents import shorten
from megatron_prune.files.pickled import Inert

UNDERSTOOD = frozenset(
    """
num_layers hidden_size ffn_hidden_size num_attention_heads group_query_attention num_query_groups kv_channels vocab_size
padded_vocab_size make_vocab_size_divisible_by untie_embeddings_and_output_weights share_embeddings_and_output_weights add_qkv_bias
qk_layernorm norm_epsilon layernorm_epsilon rotary_base use_rope_scaling rope_scaling rope_scaling_factor
rotary_seq_len_interpolation_factor seq_len_interpolation_factor max_position_embeddings window_size tensor_model_parallel_size
heterogeneous_layers_config_encoded_json pipeline_model_parallel_size
""".split()
)

_OFF = (False, None)
_NONE = (None, 0, False, "", (), "none")
FIXED: dict[str, tuple[Any, ...]] = {
    "normalization": ("RMSNorm",),
    "swiglu": (True,),
    "gated_linear_unit": (True,),
    "activation_func": ("torch.nn.functional.silu", "silu", "swish"),
    "activation_func_clamp_value": (None,),
    "glu_linear_offset": (0.0, None),
    "openai_gelu": _OFF,
    "onnx_safe": _OFF,
    "squared_relu": _OFF,
    "quick_geglu": _OFF,
    "add_bias_linear": (False,),
    "apply_layernorm_1p": _OFF,
    "layernorm_zero_centered_gamma": _OFF,
    "apply_residual_connection_post_layernorm": _OFF,
    "position_embedding_type": ("rope",),
    "rope_type": ("rope", None),
    "rotary_percent": (1.0, None),
    "rotary_interleaved": _OFF,
    "no_rope_freq": _NONE,
    "mrope_section": _NONE,
    "window_attn_skip_freq": _NONE,
    "interleaved_attn_pattern": _NONE,
    "is_vision_language": _OFF,
    "attention_chunk_size": _NONE,
    "nope_layer_interval": _NONE,
    "attention_output_gate": _OFF,
    "qk_l2_norm": _OFF,
    "softmax_scale": (None,),
    "softmax_type": ("vanilla", None),
    "multi_latent_attention": _OFF,
    "experimental_attention_variant": _NONE,
    "linear_attention_freq": _NONE,
    "num_experts": _NONE,
    "num_moe_experts": _NONE,
    "mtp_num_layers": _NONE,
    "mtp_enabled": _OFF,
    "mtp_standalone": _OFF,
    "is_hybrid_model": _OFF,
    "hybrid_attention_ratio": _NONE,
    "hybrid_mlp_ratio": _NONE,
    "hybrid_override_pattern": _NONE,
    "hybrid_layer_pattern": _NONE,
    "enable_mhc_connections": _OFF,
    "retro_add_retriever": _OFF,
    "use_mup": _OFF,
    "spec": _NONE,
    "transformer_layer_spec": tuple(
        f"megatron.bridge.models.gpt_provider.{name}_layer_spec"
        for name in ("default", "local", "transformer_engine", "transformer_engine_full", "modelopt_transformer")
    ),
}
"""Argument → values at which the model is one that this project carries; the first is what is asked for in messages."""

_NO_EFFECT = frozenset(
    """
_cpu_offloading_context _is_global_batch_size_explicitly_specified _pg_collection account_for_embedding_in_pipeline_split
account_for_loss_in_pipeline_split accumulate_allreduce_grads_in_fp32 activation_func_fp8_input_store
activation_offload_fraction add_position_embedding align_grad_reduce align_param_gather allow_ambiguous_pad_tokens
app_tag_run_name app_tag_run_version apply_query_key_layer_scaling apply_rope_fusion apply_wd_to_qk_layernorm
attention_backend attention_dropout attention_softmax_in_fp32 auto_detect_ckpt_format autocast_dtype barrier_with_L1_time
batch_invariant_backend batch_invariant_mode beta_fast beta_slow bf16 bias_activation_fusion bias_dropout_add_fusion
bias_dropout_fusion bias_gelu_fusion bias_swiglu_fusion biencoder_projection_dim biencoder_shared_query_context_model
block_data_path cache_mla_latents calc_ft_timeouts calculate_per_token_loss chat_template check_for_large_grads
check_for_nan_in_loss_and_grad check_for_spiky_loss check_weight_hash_across_dp_replicas_interval classes_fraction clip_grad
clone_scatter_output_in_embedding config_logger_dir consumed_train_samples consumed_valid_samples context_parallel_size
cp_comm_type cpu_offloading create_all_gather_group create_attention_mask_in_dataloader cross_entropy_fusion_impl
cross_entropy_loss_fusion deallocate_pipeline_outputs decode_only_cuda_graphs decoder_first_pipeline_num_layers
decoder_last_pipeline_num_layers decoder_num_layers decoder_seq_length decoupled_lr decoupled_min_lr
decrease_batch_size_if_needed defer_embedding_wgrad_compute delay_grad_reduce delay_offload_until_cuda_graph
delay_param_gather delay_wgrad_compute delta_offload_bytes_across_pp_ranks dense_grouped_gemm deprecated_use_mcore_models
deterministic_mode disable_bf16_reduced_precision_matmul disable_chunked_prefill disable_jit_fuser disable_mamba_mem_eff_path
disable_msc_deprecated disable_parameter_transpose_cache disable_straggler_on_startup disable_symmetric_registration
distribute_saved_activations embedding_init_method embedding_init_method_std embedding_path empty_unused_memory_level
enable_autocast enable_chunked_prefill enable_cuda_graph enable_experimental enable_ft_package enable_full_sharding_in_hsdp
enable_gloo_process_groups enable_msc enable_one_logger end_weight_decay eod_mask_loss ep_overlap_early_attn_memory_release
evidence_data_path experimental_attention_variant_loss_scale_func expert_gtp_weight_remat_size expert_model_parallel_size
expert_tensor_parallel_num_weight_shards expert_tensor_parallel_size external_cuda_graph fake_process_group
finalize_model_grads_func fine_grained_activation_offloading finetune first_last_layers_bf16 flash_attention_version
flash_decode fp16 fp32_residual_connection fp4 fp8 freeze_all_layers ft_num_warmup_iters full_validation
fused_residual_rmsnorm fused_single_qkv_rope generation_config global_batch_size gpu_sniff_test_interval
gradient_accumulation_fusion gradient_reduce_div_fusion head_lr_mult hetereogenous_dist_checkpoint heterogeneous_block_specs
heterogeneous_layers_config_path hf_model_id
hf_model_revision hidden_dropout high_priority_a2a_comm_stream high_priority_stream_groups hybrid_context_parallel hysteresis
img_h img_w init_method init_method_std init_method_xavier_uniform init_model_with_meta_device initial_loss_scale
iter_per_epoch iteration iterations_to_skip keep_fp8_transpose_cache keep_fp8_transpose_cache_when_using_custom_fsdp
kv_lora_rank lazy_mpu_init legacy_tokenizer linear_conv_kernel_dim linear_key_head_dim linear_num_key_heads
linear_num_value_heads linear_value_head_dim lion_beta1 lion_beta2 load load_main_params_from_ckpt load_model_opt_format
local_rank logit_dtype loss_scale loss_scale_window lr manual_gc mask_factor mask_prob mask_type masked_softmax_fusion
max_seqlen_per_dp_cp_rank max_tokens_to_oom memory_efficient_layer_norm memory_snapshot_path merge_file metadata_path
micro_batch_size microbatch_group_size_per_vp_stage mid_level_dataset_surplus min_loss_scale min_lr min_offloaded_tensor_size
mixed_precision_wrapper mla_down_proj_fusion mlp_chunks_for_prefill mlp_chunks_for_training mmap_bin_files mock_data
model_type mscale mscale_all_dim mtp_detach_heads mtp_grad_scale_func mtp_hsm mtp_hybrid_override_pattern
mtp_loss_scaling_factor mtp_use_repeated_layer multiple_validation_sets no_persist_layer_norm no_sync_func
no_weight_decay_cond_type null_tokenizer_eod_id null_tokenizer_pad_id num_channels num_classes num_dataset_builder_threads
num_distributed_optimizer_instances num_floating_point_operations_so_far num_layers_at_end_in_bf16 num_layers_at_start_in_bf16
num_layers_in_first_pipeline_stage num_layers_in_last_pipeline_stage num_layers_per_virtual_pipeline_stage
num_microbatches_with_partial_activation_checkpoints num_speculative_tokens num_virtual_stages_per_pipeline_rank num_workers
nvtx_ranges object_storage_cache_path offload_modules offset_sampling_seed_by_dp_rank optimizer
original_max_position_embeddings outer_dp_sharding_strategy output_bert_embeddings output_layer_init_method pad_vocab_size
parallel_output param_sync_func params_dtype patch_dim per_dataset_sequences_path per_split_data_args_path
perform_initialization perform_rl_step persist_layer_norm phase_transition_iterations pipeline_dtype
pipeline_model_parallel_comm_backend pipeline_model_parallel_layout pipeline_model_parallel_split_rank post_wrap_hook
pre_wrap_hook pretrained_checkpoint profile q_lora_rank qk_clip qk_clip_alpha qk_clip_threshold qk_head_dim
qk_pos_emb_head_dim quant_recipe query_in_block_prob rampup_batch_size rank record_memory_history record_shapes refit_method
renormalize_blend_weights replication replication_factor replication_jump reset_attention_mask reset_position_ids
restore_modelopt_state result_rejected_tracker_filename reuse_grad_buf_for_mxfp8_param_ag rotary_scaling_factor
run_workload_inspector_server s3_cache_path sample_rate save scatter_embedding_sequence_parallel
scatter_gather_tensors_in_pipeline seed seq_length sequence_parallel sft sharp_enabled_group short_seq_prob should_pad_vocab
skip_train special_tokens split standalone_embedding_stage start_eval_at_iter start_weight_decay step_batch_size_schedule
stream_ckpt_dequant strict_fsdp_dtensor_load suggested_communication_unit_size swin_backbone_type symmetric_ar_type
te_precision_config_file te_rng_tracker tensor_parallel_num_weight_shards test_data_path test_mode timers titles_data_path
torch_fsdp2_reshard_after_forward tp_only_amax_red transformer_impl transformer_pipeline_model_parallel_size trust_remote_code
use_arbitrary_attention_mask use_checkpoint_args use_checkpoint_opt_param_scheduler use_cpu_initialization use_custom_fsdp
use_dist_ckpt use_dist_ckpt_deprecated use_distributed_optimizer use_flash_attn use_fused_weighted_squared_relu use_gigatoken
use_gloo_process_groups use_grouped_gemm_for_dense_mlp use_grouped_gemm_for_shared_expert use_inference_optimized_layers
use_kitchen use_kitchen_attention use_layer_wise_distributed_optimizer use_layer_wise_param_layout use_legacy_models
use_legacy_static_engine use_mamba_mem_eff_path use_mcore_models use_megatron_fsdp use_mp_args_from_checkpoint_args
use_one_sent_docs use_persistent_ckpt_worker use_precision_aware_optimizer use_pytorch_profiler use_ring_exchange_p2p
use_rotary_position_embeddings use_sharp use_te_activation_func use_te_rng_tracker use_tokenizer_model_from_checkpoint_args
use_torch_fsdp2 use_torch_optimizer_for_cpu_offload use_tp_pp_dp_mapping use_transformer_engine_full_layer_spec
use_transformer_engine_op_fuser v_head_dim variable_seq_lengths verify_integrity virtual_pipeline_model_parallel_size
vocab_extra_ids vocab_file weight_decay world_size wrap_with_ddp yaml_cfg
""".split()
)
_NO_EFFECT_GROUPS = tuple(
    f"{group}_"
    for group in """
adam adlr async batch_p2p bert ckpt cpu_offloading cuda_graph data dataloader ddp dino dist_ckpt distrib_optim distributed dsa
dump encoder error_injection eval exit exp_avg fault_injector fim fine_grained_offloading flight_recorder fp16 fp4 fp8 fsdp
gdp grad grpo gtp hierarchical ict indexer inference inprocess kitchen langrl log logging logits lr main_grads main_params
mamba manual_gc megatron_fsdp mhc moe muon mup nccl no_load no_save non_persistent one_logger optimizer otel overlap override
pin_cpu profile pytorch_profiler recompute relative_attention rerun retriever retro rl save sft sgd skipped straggler
tensorboard tiktoken timing tokenizer tp_comm train use_megatron_fsdp valid validation vision wandb weight_decay wgrad yarn
""".split()
)


def refused_arguments(
    stored: dict[str, Any],
    ignored: frozenset[str],
    fixed: Mapping[str, tuple[Any, ...]] = MappingProxyType({}),
    understood: frozenset[str] = frozenset(),
) -> list[str]:
    """What is said in words of every stored argument that changes the model in a way not carried here, or is not known.

    Args:
        ignored: arguments that the user knows to be harmless.
        fixed, understood: what a family says otherwise than :data:`FIXED`, and reads beside :data:`UNDERSTOOD`.
    """
    problems, expected = [], {**FIXED, **fixed}
    windowed = stored.get("window_size") is not None
    for name, value in stored.items():
        if name in ignored or name in understood or (name in UNDERSTOOD and name not in fixed):
            continue
        if name in expected:
            if not _is_one_of(value, expected[name]) and (windowed or name != "window_attn_skip_freq"):
                problems.append(f"{name} = {shown(value)}, needed {expected[name][0]!r}")
        elif name not in _NO_EFFECT and not name.startswith(_NO_EFFECT_GROUPS) and not _says_nothing(value):
            problems.append(f"{shorten(name)[1:-1]} = {shown(value)}: not an argument that is known here")
    return problems


def shown(value: Any) -> str:
    """A stored value for a message, with the type that is not known here."""
    return f"a value of type {shorten(value.kind)[1:-1]}" if isinstance(value, Inert) else shorten(value)


def _is_one_of(value: Any, harmless: tuple[Any, ...]) -> bool:
    if isinstance(value, Inert):
        return value.arguments is None and value.kind in harmless  # a function or a class, by its name
    if isinstance(value, (list, tuple)):  # one flag a layer
        return None in harmless and len(value) < 10_000 and all(type(item) in (int, bool) and not item for item in value)
    return type(value) in (bool, int, float, str, type(None)) and value in harmless


def _says_nothing(value: Any) -> bool:
    return value is None or (isinstance(value, (bool, int, float, str, list, tuple, dict, set)) and not value)
