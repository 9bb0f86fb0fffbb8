"""What a conversion, a pruning and a recovery would need, from ``config.json`` or a manifest alone."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

from rich.markup import escape
from rich.table import Table

from megatron_prune.arch.model import ModelConfig
from megatron_prune.arch.sharding import ParallelLayout
from megatron_prune.arch.tensors import parameter_count
from megatron_prune.checkpoint import model_folder
from megatron_prune.checkpoint.description import Told
from megatron_prune.config import check_limits
from megatron_prune.errors import InputError
from megatron_prune.families.family import Family, family_of
from megatron_prune.opening.foreign import told
from megatron_prune.planning.allocators.allocator import Bounds
from megatron_prune.planning.amounts import SEQ_LENGTH
from megatron_prune.planning.budget import parse_bytes, read_budget
from megatron_prune.planning.layer_sizes import read_layer_sizes
from megatron_prune.planning.loss_weights import even_loss, rank_candidates
from megatron_prune.planning.multiples import check_multiples, parse_multiples
from megatron_prune.planning.needs import STEPS, Setup
from megatron_prune.planning.remedies import remedy
from megatron_prune.planning.resources import Training, saving_memory, training_memory
from megatron_prune.planning.shapes import uniform_shapes
from megatron_prune.planning.target import check_target, resolve_target
from megatron_prune.planning.words import cut_in_words
from megatron_prune.planning.work import Rates
from megatron_prune.recovery.options import check_passes, recomputation
from megatron_prune.runtime.reporting import print_table, shown_bytes, shown_time
from megatron_prune.runtime.world import World
from megatron_prune.verbs.estimate import EstimateOptions

ITEM_BYTES = {"fp32": 4, "bf16": 2, "fp16": 2}
SIZES = (
    "hidden_size_remain",
    "ffn_hidden_size_remain",
    "num_attention_heads_remain",
    "num_query_groups_remain",
    "num_layers_remain",
    "layer_sizes",
)


def estimate(options: EstimateOptions, world: World) -> None:
    """Run the step.

    Raises:
        InputError: if the layout, the requested shape or a budget does not fit the model.
    """
    sizes = ["target_tensor_parallel_size", "target_pipeline_parallel_size", "data_parallel_size"]
    check_limits(options)
    config, family = read_config(options.load, world, told(options))
    layout = ParallelLayout(
        tensor=options.target_tensor_parallel_size,
        pipeline=options.target_pipeline_parallel_size,
        vocab_divisible_by=options.make_vocab_size_divisible_by,
    )
    layout.check(config)
    target, among = target_of(options, config, layout, family)
    facts = estimate_steps(read_setup(options, config, target, layout), options)
    facts["shape"] = {name: getattr(target, name) for name in ("num_layers", "hidden_size", "ffn_hidden_size")}
    facts["shape"] |= {name: getattr(target, name) for name in ("num_attention_heads", "num_query_groups")}
    facts["shapes_within_budget"] = among
    if world.is_main:
        print(json.dumps(facts, indent=2)) if options.json else show(facts, config, target, options)


def target_of(
    options: EstimateOptions, config: ModelConfig, layout: ParallelLayout, family: Family
) -> tuple[ModelConfig, int | None]:
    """The shape that is asked for; within a budget the one that ``prune`` takes where every unit counts the same, and how many
    there are.

    Raises:
        InputError: if it does not fit the model, the layout or the family.
    """
    multiples = parse_multiples(options.multiple_of, "--multiple-of") if options.multiple_of else {}
    budget = read_budget(
        params=options.params,
        ratio=options.ratio,
        memory=options.memory,
        seq_length=options.memory_seq_length,
        batch=options.memory_batch,
        dtype_bytes=ITEM_BYTES[options.target_params_dtype],
    )
    if budget is not None:
        named = {name: getattr(options, name) for name in SIZES}
        bounds = Bounds(
            config=config,
            budget=budget,
            multiple_of=multiples,
            layout=layout,
            prune_type="balance",
            check=family.check_expressible,
        )
        shapes = uniform_shapes(bounds, fixed=named)
        return rank_candidates(config, shapes, even_loss(config))[0][1], len(shapes)
    target = resolve_target(
        config,
        **{name.removesuffix("_remain"): getattr(options, name) for name in SIZES if name != "layer_sizes"},
        by_layer=read_layer_sizes(Path(options.layer_sizes)) if options.layer_sizes else None,
    )
    check_multiples(config, target.config, multiples)
    check_target(config, target, layout, "balance")
    layout.check(target.config)
    return target.config, None


def read_setup(options: EstimateOptions, config: ModelConfig, target: ModelConfig, layout: ParallelLayout) -> Setup:
    """How the steps would run.

    Raises:
        InputError: on options that do not fit the model or each other.
    """
    if options.recompute and options.recompute_granularity is None:
        options = replace(options, recompute_granularity="full")
    positions = config.max_position_embeddings
    options = replace(options, seq_length=options.seq_length or min(4096, positions), **recomputation(options))
    lengths = {"seq_length": options.seq_length, "sample_length": options.sample_length or min(SEQ_LENGTH, positions)}
    for name, length in lengths.items():
        if not 2 <= length <= positions:
            raise InputError(f"--{name.replace('_', '-')}", got=length, needed=f"2 to the model's {positions}")
    check_passes(options, layout, target.num_layers)
    run = Training(
        data_parallel=options.data_parallel_size,
        micro_batch_size=options.micro_batch_size,
        seq_length=options.seq_length,
        mixed_precision=options.bf16 or options.fp16,
        sequence_parallel=options.sequence_parallel,
        recompute_granularity=options.recompute_granularity,
        recompute_method=options.recompute_method,
        recompute_num_layers=options.recompute_num_layers,
        lora_r=options.lora_r,
        teacher=config if options.distill else None,
    )
    return Setup(
        config=config,
        target=target,
        layout=layout,
        data_parallel=options.data_parallel_size,
        samples=options.nsamples,
        sample_length=lengths["sample_length"],
        width=ITEM_BYTES[options.dtype],
        itemsize=ITEM_BYTES[options.target_params_dtype],
        passes=options.reconstruct,
        run=run,
        train_tokens=options.train_tokens,
    )


def estimate_steps(setup: Setup, options: EstimateOptions) -> dict[str, Any]:
    """Bytes and seconds by step.

    Raises:
        InputError: if a rate is not positive, or ``--device-memory`` is no size.
    """
    rates = read_rates(options)
    device_memory = parse_bytes(options.device_memory, "--device-memory") if options.device_memory else None
    steps = {}
    for step in STEPS:
        memory = step.memory(setup)
        steps[step.name] = found = {
            "memory_per_rank": memory.alone,
            "device_memory_per_rank": memory.device,
            "host_memory_first_rank": memory.first,
            "host_memory_per_rank": memory.others,
            "host_memory": memory.together(setup.processes),
            "disk": step.disk(setup),
            "seconds": rates.seconds(step.work(setup)),
        }
        if device_memory is not None:
            found["fits"] = memory.device <= device_memory
            if not found["fits"]:
                found["would_fit_with"] = remedy(step, setup, device_memory)
    recovery = {"parts": training_memory(setup.target, setup.layout, setup.run), "devices": setup.processes}
    recovery["host_memory_to_save"] = saving_memory(setup.target, setup.layout, setup.run)
    steps["recovery"] |= recovery
    found = {"parameters": parameter_count(setup.config), "target_parameters": parameter_count(setup.target)}
    return {**found, "processes": setup.processes, "steps": steps}


def read_rates(options: EstimateOptions) -> Rates:
    """How fast devices and disks are.

    Raises:
        InputError: if one is not positive.
    """
    names = ("train_tokens", "device_tflops", "device_tflops_full", "device_bandwidth", "mfu", "disk_bandwidth")
    for name in names:
        if not 0 < getattr(options, name) < float("inf"):
            raise InputError(f"--{name.replace('_', '-')}", got=getattr(options, name), needed="a positive number")
    return Rates(
        half=options.mfu * options.device_tflops * 1e12,
        full=options.mfu * options.device_tflops_full * 1e12,
        moved=options.device_bandwidth * 1e12,
        disk=options.disk_bandwidth * 1e9,
    )


def show(facts: dict[str, Any], config: ModelConfig, target: ModelConfig, options: EstimateOptions) -> None:
    """Print a table, and what it rests on."""
    processes, limited = facts["processes"], options.device_memory is not None
    columns = [
        "step",
        "device memory",
        "host memory",
        *([f"of all {processes}"] if processes > 1 else []),
        "disk written",
        "time",
    ]
    table = Table(*columns, *(["fits"] if limited else []), title=f"{escape(options.load)}: estimates for a rank")
    when = {step.name: f" ({step.when})" if step.when else "" for step in STEPS}
    for name, need in facts["steps"].items():
        device = shown_bytes(need["device_memory_per_rank"]) if need["device_memory_per_rank"] else "none"
        host = [shown_bytes(need["host_memory_first_rank"]), *([shown_bytes(need["host_memory"])] if processes > 1 else [])]
        row = [name + when[name], device, *host, shown_bytes(need["disk"]), shown_time(need["seconds"])]
        table.add_row(*row, *(["yes" if need["fits"] else "no"] if limited else []))
    print_table(table)
    print(cut_in_words(config, target))
    if (among := facts["shapes_within_budget"]) is not None:
        assumed = (
            "; taken is what prune takes where every unit counts the same, its scores may choose another" if among > 1 else ""
        )
        print(f"shapes within the budget: {among}{assumed}")
    for name, need in facts["steps"].items():
        if not need.get("fits", True):
            would = need["would_fit_with"]
            print(
                f"{name} does not fit in {options.device_memory}; "
                + (f"it would with {would}" if would else "no layout tried does")
            )
    recovery = facts["steps"]["recovery"]
    parts = ", ".join(f"{name} {shown_bytes(amount)}" for name, amount in recovery["parts"].items())
    print(f"a recovery rank: {parts}; it saves through {shown_bytes(recovery['host_memory_to_save'])} of host memory")
    print(
        f"recovery on {options.train_tokens:,.0f} tokens, {processes} device{'s' if processes > 1 else ''} at {options.mfu:.0%} of "
        f"{options.device_tflops:g} TFLOP/s ({options.device_tflops_full:g} in fp32), disk at {options.disk_bandwidth:g} GB/s; "
        "without a device all memory is the host's"
    )


def read_config(name_or_path: str, world: World, beside: Told = Told()) -> tuple[ModelConfig, Family]:
    """The model's sizes and family from a directory of either kind, or from a ``config.json`` alone."""
    path = Path(name_or_path)
    if path.is_dir() and not model_folder.is_huggingface(path):
        from megatron_prune.opening.opened import open_either  # torch, which a configuration alone need not wait for

        model = open_either(name_or_path, world, beside)
        return model.config, model.family
    hf_config = model_folder.read_config(path if path.exists() else model_folder.fetch_config(name_or_path))
    family = family_of(hf_config)
    return family.model_config(hf_config), family
