"""``RecoverOptions`` as the parts that a run is put together from, and what a run is."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import torch

from megatron_prune.arch.adapter import AdapterConfig, target_roles
from megatron_prune.arch.tensors import full_shape, tensor_ids
from megatron_prune.opening.opened import Opened
from megatron_prune.planning.resources import Training, training_disk
from megatron_prune.recovery.data import BatchSizes, DataOptions
from megatron_prune.recovery.hidden_match import layer_pairs
from megatron_prune.recovery.optimizer import OptimizerOptions
from megatron_prune.recovery.options import FREE, RecoverOptions


def run_settings(options: RecoverOptions, model: Opened) -> dict[str, Any]:
    """What a run is, JSON-able: it may not change when the run goes on."""
    settings = {item.name: getattr(options, item.name) for item in dataclasses.fields(options) if item.name not in FREE}
    settings["start"] = model.recorded_identity
    return json.loads(json.dumps(settings))


def checkpoint_bytes(options: RecoverOptions, model: Opened) -> int:
    """Of one checkpoint of the run, at most."""
    if options.lora_r:
        lora = adapter_config(options)
        adapted = [tensor for tensor in tensor_ids(model.config) if tensor.role in lora.roles]
        return 16 * lora.r * sum(sum(full_shape(tensor, model.config)) for tensor in adapted)
    return training_disk(model.config, Training(mixed_precision=options.bf16 or options.fp16))


def batch_sizes(options: RecoverOptions) -> BatchSizes:
    """Of the steps."""
    return BatchSizes(global_batch=options.global_batch_size, micro_batch=options.micro_batch_size)


def optimizer_options(options: RecoverOptions) -> OptimizerOptions:
    """The optimizer's part of the options."""
    return OptimizerOptions(**{item.name: getattr(options, item.name) for item in dataclasses.fields(OptimizerOptions)})


def data_options(options: RecoverOptions) -> DataOptions:
    """The part of the options that says what is trained and measured on."""
    names = [item.name for item in dataclasses.fields(DataOptions) if item.name not in ("cache", "shared")]
    cache, shared = Path(options.data_cache_path or Path(options.save) / "data_cache"), options.data_cache_path is not None
    return DataOptions(**{name: getattr(options, name) for name in names}, cache=cache, shared=shared)


def sample_counts(options: RecoverOptions) -> tuple[int, int, int]:
    """Samples that are trained on, and that either held-out loss is measured on."""
    held_out = options.eval_iters * options.global_batch_size
    return options.train_iters * options.global_batch_size, held_out, held_out


def adapter_config(options: RecoverOptions) -> AdapterConfig | None:
    """What adapters are trained, if any."""
    if options.lora_r is None:
        return None
    return AdapterConfig(
        r=options.lora_r,
        alpha=options.lora_alpha,
        dropout=options.lora_dropout,
        roles=target_roles(options.lora_targets),
        seed=options.seed,
    )


def compute_dtype(options: RecoverOptions) -> torch.dtype:
    """What the run computes in."""
    return torch.bfloat16 if options.bf16 else torch.float16 if options.fp16 else torch.float32


def hidden_pairs(options: RecoverOptions, teacher: Opened, student: Opened) -> list[tuple[int, int]]:
    """Layers that are compared, (student's, teacher's)."""
    kept = student.checkpoint.manifest.kept_layers
    return layer_pairs(student.config.num_layers, teacher.config.num_layers, kept, options.hidden_layers)
