"""What a conversion, a pruning and a recovery would need, from ``config.json`` or a manifest alone."""

from __future__ import annotations

import json
from datetime import timedelta
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from megatron_prune.arch.model import ModelConfig
from megatron_prune.arch.sharding import ParallelLayout
from megatron_prune.arch.tensors import parameter_count
from megatron_prune.checkpoint import model_folder
from megatron_prune.checkpoint.description import Told
from megatron_prune.config import require_positive
from megatron_prune.errors import InputError
from megatron_prune.families.family import family_of
from megatron_prune.opening.foreign import told
from megatron_prune.planning.amounts import AFTER, BATCH_TOKENS, PROBED, SAMPLED_TOGETHER, SEQ_LENGTH
from megatron_prune.planning.layer_sizes import read_layer_sizes
from megatron_prune.planning.resources import (
    Text,
    Training,
    gradient_memory,
    probing_memory,
    refit_memory,
    sampling_memory,
    saving_memory,
    streaming_memory,
    training_disk,
    training_memory,
    training_seconds,
    weight_bytes,
)
from megatron_prune.planning.target import resolve_target
from megatron_prune.runtime.reporting import shown_bytes
from megatron_prune.runtime.world import World
from megatron_prune.verbs.estimate import EstimateOptions

ITEM_BYTES = {"fp32": 4, "bf16": 2, "fp16": 2}


def estimate(options: EstimateOptions, world: World) -> None:
    """Run the step.

    Raises:
        InputError: if the layout or the requested shape does not fit the model.
    """
    sizes = ["target_tensor_parallel_size", "target_pipeline_parallel_size", "data_parallel_size"]
    require_positive(options, *sizes, "make_vocab_size_divisible_by", "micro_batch_size", "seq_length", "nsamples")
    config = read_config(options.load, world, told(options))
    layout = ParallelLayout(
        tensor=options.target_tensor_parallel_size,
        pipeline=options.target_pipeline_parallel_size,
        vocab_divisible_by=options.make_vocab_size_divisible_by,
    )
    target = resolve_target(
        config,
        hidden_size=options.hidden_size_remain,
        ffn_hidden_size=options.ffn_hidden_size_remain,
        num_attention_heads=options.num_attention_heads_remain,
        num_query_groups=options.num_query_groups_remain,
        num_layers=options.num_layers_remain,
        by_layer=read_layer_sizes(Path(options.layer_sizes)) if options.layer_sizes else None,
    ).config
    layout.check(config)
    layout.check(target)
    facts = estimate_steps(config, target, layout, options)
    if not world.is_main:
        return
    if options.json:
        print(json.dumps(facts, indent=2))
        return
    table = Table("step", "memory of a process", "disk written", title=f"{escape(options.load)}: estimates")
    for step, need in facts["steps"].items():
        table.add_row(step, shown_bytes(need["memory_per_rank"]), shown_bytes(need["disk"]))
    Console().print(table)
    parts = ", ".join(f"{name} {shown_bytes(amount)}" for name, amount in facts["steps"]["recovery"]["parts"].items())
    print(f"parameters: {facts['parameters']:,} → {facts['target_parameters']:,}; a recovery rank: {parts}")
    recovery = facts["steps"]["recovery"]
    print(
        f"recovery on {options.train_tokens:,.0f} tokens with {recovery['devices']} device{'s' if recovery['devices'] > 1 else ''} "
        f"(a rank saves through {shown_bytes(recovery['host_memory_to_save'])} of host memory) at {options.mfu:.0%} of {options.device_tflops:g} TFLOP/s: {timedelta(seconds=round(recovery['seconds']))}"
    )


def estimate_steps(config: ModelConfig, target: ModelConfig, layout: ParallelLayout, options: EstimateOptions) -> dict[str, Any]:
    """Bytes by step."""
    item = ITEM_BYTES[options.target_params_dtype]
    run = Training(
        data_parallel=options.data_parallel_size,
        micro_batch_size=options.micro_batch_size,
        seq_length=options.seq_length,
        mixed_precision=item == 2,
        sequence_parallel=layout.tensor > 1,
        recompute=options.recompute,
        teacher=config if options.distill else None,
    )
    for name in ("train_tokens", "device_tflops", "mfu"):
        if not 0 < getattr(options, name) < float("inf"):
            raise InputError(f"--{name.replace('_', '-')}", got=getattr(options, name), needed="a positive number")
    devices = layout.tensor * layout.pipeline * options.data_parallel_size
    seconds = training_seconds(
        target, run, tokens=options.train_tokens, devices=devices, flops=options.mfu * options.device_tflops * 1e12
    )
    parts = training_memory(target, layout, run)
    length = min(SEQ_LENGTH, config.max_position_embeddings) if options.sample_length is None else options.sample_length
    if not 2 <= length <= config.max_position_embeddings:
        raise InputError("--sample-length", got=length, needed=f"2 to the model's {config.max_position_embeddings}")
    text = Text(
        samples=options.nsamples,
        seq_length=length,
        copies=layout.pipeline * options.data_parallel_size,
        sampled=SAMPLED_TOGETHER,
        batch_tokens=BATCH_TOKENS,
    )
    window = 1 if target.num_layers == config.num_layers else 1 + AFTER
    return {
        "parameters": parameter_count(config),
        "target_parameters": parameter_count(target),
        "steps": {
            "conversion": {"memory_per_rank": streaming_memory(config, item), "disk": weight_bytes(config, item)},
            "sampling text": {
                "memory_per_rank": sampling_memory(config, layout, text),
                "disk": 8 * text.samples * text.seq_length,
            },
            "scoring by gradients": {"memory_per_rank": gradient_memory(config, layout, text), "disk": 0},
            "costs of blocks": {"memory_per_rank": probing_memory(config, layout, text, PROBED), "disk": 0},
            "re-fitting": {
                "memory_per_rank": refit_memory(config, target, layout, text, window),
                "disk": weight_bytes(target, 4),
            },
            "cutting": {"memory_per_rank": streaming_memory(config, item, buffers=2), "disk": weight_bytes(target, item)},
            "export": {"memory_per_rank": streaming_memory(target, item), "disk": weight_bytes(target, item)},
            "recovery": {
                "memory_per_rank": sum(parts.values()),
                "disk": training_disk(target, run),
                "parts": parts,
                "host_memory_to_save": saving_memory(target, layout, run),
                "devices": devices,
                "seconds": seconds,
            },
        },
    }


def read_config(name_or_path: str, world: World, beside: Told = Told()) -> ModelConfig:
    """The model's sizes from a directory of either kind, or from a ``config.json`` alone."""
    path = Path(name_or_path)
    if path.is_dir() and not model_folder.is_huggingface(path):
        from megatron_prune.opening.opened import open_either  # torch, which a configuration alone need not wait for

        return open_either(name_or_path, world, beside).config
    hf_config = model_folder.read_config(path if path.exists() else model_folder.fetch_config(name_or_path))
    return family_of(hf_config).model_config(hf_config)
