"""Megatron's command-line flags, accepted beside this project's own so that a cluster's ``GPT_ARGS`` need no change.

Flags that describe the model must agree with the checkpoint; those that describe the run's parallel layout are used;
flags of training are accepted and have no effect on pruning. (Names: Megatron-LM core_v0.16.1 ``arguments.py``.)
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from typing import Any

from megatron_prune.arch.model import ModelConfig, RopeScaling
from megatron_prune.config import flag
from megatron_prune.errors import InputError, raise_all

_MODEL = {
    "num_layers": int,
    "hidden_size": int,
    "ffn_hidden_size": int,
    "num_attention_heads": int,
    "num_query_groups": int,
    "kv_channels": int,
    "vocab_size": int,
    "max_position_embeddings": int,
    "norm_epsilon": float,
    "rotary_base": float,
    "rotary_percent": float,
    "rope_scaling_factor": float,
}
_FIXED = {"rotary_percent": 1.0}
_MODEL_SWITCHES = {
    "untie_embeddings_and_output_weights": lambda config: not config.tie_embeddings,
    "add_qkv_bias": lambda config: config.qkv_bias,
    "qk_layernorm": lambda config: config.qk_norm,
    "swiglu": lambda config: True,
    "disable_bias_linear": lambda config: True,
    "group_query_attention": lambda config: config.each("num_query_groups") != config.each("num_attention_heads"),
    "use_rope_scaling": lambda config: any(scaling and scaling.kind == "llama3" for scaling in config.each("rope_scaling")),
}
_MODEL_CHOICES = {"normalization": "RMSNorm", "position_embedding_type": "rope"}
_TRAINING = """
seq_length micro_batch_size global_batch_size rampup_batch_size train_iters train_samples lr min_lr lr_decay_style
lr_decay_iters lr_warmup_iters lr_warmup_fraction weight_decay clip_grad adam_beta1 adam_beta2 adam_eps init_method_std
attention_dropout hidden_dropout initial_loss_scale loss_scale save_interval log_interval eval_interval eval_iters
data_path split data_cache_path tokenizer_type tokenizer_model vocab_file merge_file make_vocab_size_divisible_by
distributed_backend distributed_timeout_minutes tensorboard_dir wandb_project num_workers dataloader_type
transformer_impl attention_backend context_parallel_size expert_model_parallel_size virtual_pipeline_model_parallel_size
num_layers_per_virtual_pipeline_stage recompute_granularity recompute_method recompute_num_layers master_addr master_port
exit_interval exit_duration_in_mins timing_log_level
""".split()
_TRAINING_SWITCHES = """
bf16 fp16 sequence_parallel use_distributed_optimizer overlap_grad_reduce overlap_param_gather use_flash_attn
use_mcore_models no_load_optim no_load_rng no_save_optim no_save_rng finetune use_checkpoint_args
use_mp_args_from_checkpoint_args auto_detect_ckpt_format exit_on_missing_checkpoint use_cpu_initialization
use_rotary_position_embeddings no_position_embedding no_masked_softmax_fusion no_bias_swiglu_fusion no_rope_fusion
no_gradient_accumulation_fusion no_persist_layer_norm recompute_activations log_throughput is_prune
no_bias_dropout_fusion no_bias_gelu_fusion accumulate_allreduce_grads_in_fp32 attention_softmax_in_fp32
""".split()


def add_megatron_flags(parser: argparse.ArgumentParser) -> None:
    """Add all flags to ``parser``, in a group of their own, not overriding those it has."""
    taken = {action.dest for action in parser._actions}
    group = parser.add_argument_group(
        "Megatron's arguments", "shape: must agree with the checkpoint; training: accepted, without effect"
    )
    for name in sorted({*_MODEL, *_MODEL_SWITCHES, *_MODEL_CHOICES, *_TRAINING, *_TRAINING_SWITCHES} - taken):
        shown = None if name in _MODEL or name in _MODEL_SWITCHES else argparse.SUPPRESS
        if name in _MODEL_SWITCHES or name in _TRAINING_SWITCHES:
            group.add_argument(flag(name), dest=name, action="store_true", help=shown)
        elif name in _MODEL:
            group.add_argument(flag(name), dest=name, type=_MODEL[name], help=shown, metavar="N")
        else:
            group.add_argument(
                flag(name), dest=name, nargs="*" if name in ("data_path", "rampup_batch_size") else None, help=shown
            )


@dataclass(frozen=True)
class MegatronFlags:
    """Megatron's flags as one of a verb's options (``FOREIGN``): a dictionary of those that describe the model and were given.

    Attributes:
        trains: the verb follows flags of training, and refuses those that it does not follow.
        field: the option.
    """

    trains: bool = False
    field: str = "megatron"

    def add(self, parser: argparse.ArgumentParser) -> None:
        """Give a parser all of the flags."""
        add_megatron_flags(parser)

    def read(self, namespace: argparse.Namespace) -> dict[str, Any]:
        """The option's value.

        Raises:
            InputError: on flags of training that are not followed.
        """
        if self.trains:
            refuse_training_flags(namespace)
        return megatron_flags(namespace)


_CHANGES_TRAINING = {
    "rampup_batch_size": None,
    "train_samples": None,
    "lr_warmup_fraction": None,
    "loss_scale": None,
    "attention_dropout": 0.0,
    "hidden_dropout": 0.0,
    "context_parallel_size": 1.0,
    "expert_model_parallel_size": 1.0,
    "virtual_pipeline_model_parallel_size": None,
    "num_layers_per_virtual_pipeline_stage": None,
    "exit_interval": None,
    "exit_duration_in_mins": None,
    "dataloader_type": "single",
}
"""flag → the value at which leaving it without effect changes nothing."""


def refuse_training_flags(namespace: argparse.Namespace) -> None:
    """Refuse flags of training that recovery does not follow, rather than to train otherwise than asked.

    Raises:
        InputError: naming all of them.
    """
    problems = []
    for name, harmless in _CHANGES_TRAINING.items():
        value = getattr(namespace, name, None)
        same = str(value) == harmless if isinstance(harmless, str) else _number(value) == harmless
        if value is not None and not (harmless is not None and same):
            problems.append(f"{flag(name)} {value}")
    raise_all(InputError, "arguments that recovery does not know what to do with", problems, do="leave them out")


def _number(text: Any) -> float | None:
    try:
        return float(text)
    except (TypeError, ValueError):
        return None


def megatron_flags(namespace: argparse.Namespace) -> dict[str, Any]:
    """The flags that describe the model and were given."""
    names = [*_MODEL, *_MODEL_SWITCHES, *_MODEL_CHOICES]
    return {name: getattr(namespace, name) for name in names if getattr(namespace, name, None) not in (None, False)}


def model_fields(flags: dict[str, Any]) -> dict[str, Any]:
    """The fields of a model's configuration that flags say, for a checkpoint that does not say them itself."""
    said = {name: value for name, value in flags.items() if name in ModelConfig.__dataclass_fields__}
    if flags.get("use_rope_scaling"):
        said["rope_scaling"] = RopeScaling(kind="llama3", factor=flags.get("rope_scaling_factor", 8.0))
    return said


def check_megatron_flags(flags: dict[str, Any], config: ModelConfig) -> None:
    """Refuse flags that contradict the checkpoint.

    Raises:
        InputError: naming every one that does.
    """
    problems = []
    for name, value in flags.items():
        if name in _MODEL:
            actual: Any = _FIXED[name] if name in _FIXED else config.uniform(name) if hasattr(config, name) else None
            if name == "rope_scaling_factor":  # a default of GPT_ARGS, of no effect without scaling
                factors = {scaling.factor for scaling in config.each("rope_scaling") if scaling}
                actual = factors.pop() if len(factors) == 1 else value
        elif name in _MODEL_SWITCHES:
            actual = _MODEL_SWITCHES[name](config)
        else:
            actual, value = _MODEL_CHOICES[name].lower(), str(value).lower()
        agrees = abs(value - actual) <= 1e-3 * abs(actual) if isinstance(actual, float) else value == actual
        if not agrees:
            problems.append(f"{flag(name)} {value}, the checkpoint has {actual}")
    raise_all(InputError, "arguments contradict the checkpoint", problems, do="correct them, or leave them out")
