"""What a conversion, a pruning and a recovery would need, from ``config.json`` or a manifest alone."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

from rich import box
from rich.table import Table
from rich.text import Text

from megatron_prune.arch.model import ModelConfig
from megatron_prune.arch.sharding import ParallelLayout
from megatron_prune.arch.tensors import parameter_count
from megatron_prune.checkpoint import model_folder
from megatron_prune.checkpoint.description import Told
from megatron_prune.config import check_limits, flag
from megatron_prune.errors import InputError
from megatron_prune.families.family import family_of
from megatron_prune.opening.foreign import told
from megatron_prune.planning.budget import parse_bytes, parse_count
from megatron_prune.planning.needs import STEPS, Setup
from megatron_prune.planning.passes import CONTEXT_BYTES
from megatron_prune.planning.remedies import remedy
from megatron_prune.planning.resources import Training, saving_memory, training_memory
from megatron_prune.planning.words import cut_in_words
from megatron_prune.planning.work import Rates
from megatron_prune.pruning.asked import names_shape
from megatron_prune.pruning.foreseen import Described, ElementType, Foreseen, check_idle, foresee
from megatron_prune.pruning.options import ChoosingOptions, CostOptions
from megatron_prune.pruning.passes import PASSES
from megatron_prune.recovery.options import check_passes, recomputation
from megatron_prune.runtime.reporting import print_table, shown_bytes, shown_memory, shown_time
from megatron_prune.runtime.world import World
from megatron_prune.verbs.estimate import EstimateOptions

ITEM_BYTES = {"fp32": 4, "bf16": 2, "fp16": 2}
AROUND = ("conversion", "export", "recovery")
"""Steps that a model has without being pruned."""


def estimate(options: EstimateOptions, world: World) -> None:
    """Run the step.

    Raises:
        InputError: if the layout, the requested shape or a budget does not fit the model.
    """
    check_limits(options)
    device_memory = device_bytes(options)
    model = described(options, world)
    layout = ParallelLayout(
        tensor=options.target_tensor_parallel_size,
        pipeline=options.target_pipeline_parallel_size,
        vocab_divisible_by=options.make_vocab_size_divisible_by,
    )
    layout.check(model.config)
    found = foreseen(options, model, layout)
    target = found.target if found else model.config
    layout.check(target, "the requested shape")
    setup = read_setup(options, model.config, target, layout, found)
    steps = {"cutting", *AROUND, *(PASSES[label] for label in found.passes)} if found else set(AROUND)
    facts = estimate_steps(setup, read_rates(options), device_memory, steps)
    facts["shape_named"] = found is not None
    facts["shape"] = {name: getattr(target, name) for name in ("num_layers", "hidden_size", "ffn_hidden_size")}
    facts["shape"] |= {name: getattr(target, name) for name in ("num_attention_heads", "num_query_groups")}
    facts["shapes_within_budget"] = found.among if found else None
    facts["text"] = {"samples": found.samples, "sample_length": found.sample_length} if found and found.passes else None
    if world.is_main:
        print(json.dumps(facts, indent=2)) if options.json else show(facts, model.config, target, options)


def device_bytes(options: EstimateOptions) -> int | None:
    """The memory of a device; ``None`` where none is named.

    Raises:
        InputError: if it is no size, or one that no device has.
    """
    if options.device_memory is None:
        return None
    size = parse_bytes(options.device_memory, "--device-memory")
    if size < CONTEXT_BYTES:
        needed = f"a size with its unit, such as 80GiB; at least {shown_memory(CONTEXT_BYTES)}, which its driver takes alone"
        raise InputError("--device-memory", got=f"{options.device_memory}: {size:,} bytes", needed=needed)
    return size


def foreseen(options: EstimateOptions, model: Described, layout: ParallelLayout) -> Foreseen | None:
    """What pruning will come to; ``None`` where no shape is named.

    Raises:
        InputError: as ``prune`` does; on options of a pruning where no shape is named.
    """
    if options.sample_length is not None and options.sample_length > model.config.max_position_embeddings:
        needed = f"2 to the model's {model.config.max_position_embeddings}"
        raise InputError("--sample-length", got=options.sample_length, needed=needed)
    if not names_shape(options):
        check_idle(options)
        if options.sample_length is not None:
            raise InputError("--sample-length without a shape to prune to", do="name one, or leave it out")
        return None
    shared = {item.name: getattr(options, item.name) for item in dataclasses.fields(CostOptions)}
    return foresee(ChoosingOptions(**shared, seq_length=options.sample_length), model, layout, options)


def read_setup(
    options: EstimateOptions, config: ModelConfig, target: ModelConfig, layout: ParallelLayout, found: Foreseen | None
) -> Setup:
    """How the steps would run.

    Raises:
        InputError: on options that do not fit the model or each other.
    """
    positions = config.max_position_embeddings
    options = replace(options, seq_length=options.seq_length or min(4096, positions), **recomputation(options))
    if not 2 <= options.seq_length <= positions:
        raise InputError(flag("seq_length"), got=options.seq_length, needed=f"2 to the model's {positions}")
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
    pruning = {}
    if found:
        pruning = {"samples": found.samples, "sample_length": found.sample_length, "sites": found.sites, "fits": found.fits}
        pruning["passes"] = found.reconstruct
    return Setup(
        config=config,
        target=target,
        layout=layout,
        data_parallel=options.data_parallel_size,
        width=ITEM_BYTES[options.dtype],
        itemsize=ITEM_BYTES[options.target_params_dtype],
        run=run,
        train_tokens=parse_count(options.train_tokens, "--train-tokens"),
        **pruning,
    )


def estimate_steps(setup: Setup, rates: Rates, device_memory: int | None, names: set[str]) -> dict[str, Any]:
    """Bytes and seconds by step.

    Args:
        device_memory: bytes of a device that steps are to fit.
        names: the steps that run.
    """
    steps = {}
    for step in STEPS:
        if step.name not in names:
            continue
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
    """How fast devices and disks are."""
    return Rates(
        half=options.mfu * options.device_tflops * 1e12,
        full=options.mfu * options.device_tflops_full * 1e12,
        moved=options.device_bandwidth * 1e12,
        disk=options.disk_bandwidth * 1e9,
    )


def show(facts: dict[str, Any], config: ModelConfig, target: ModelConfig, options: EstimateOptions) -> None:
    """Print a table, and what it rests on."""
    processes = facts["processes"]
    print_table(_table(facts, options))
    if facts["shape_named"]:
        print(cut_in_words(config, target))
    else:
        print(
            "no shape is named (--ratio 0.25, --num-layers-remain 24 …): what pruning takes is left out, and export and recovery are "
            "of the whole model"
        )
    if (among := facts["shapes_within_budget"]) is not None:
        assumed = "; taken is what prune takes where every unit counts the same, its scores may choose another" * (among > 1)
        print(f"shapes within the budget{' that --serve takes' if options.serve else ''}: {among}{assumed}")
    if text := facts["text"]:
        print(f"text: {text['samples']} samples of {text['sample_length']} tokens{' (--quick)' if options.quick else ''}")
    for name, need in facts["steps"].items():
        if not need.get("fits", True):
            would = need["would_fit_with"]
            print(
                f"{name} does not fit in {options.device_memory}; "
                + (f"it would with {would}" if would else "no layout tried does")
            )
    recovery = facts["steps"]["recovery"]
    parts = ", ".join(f"{name} {shown_memory(amount)}" for name, amount in recovery["parts"].items())
    print(f"a recovery rank: {parts}; it saves through {shown_memory(recovery['host_memory_to_save'])} of host memory")
    print(
        f"recovery on {parse_count(options.train_tokens):,} tokens, {processes} device{'s' if processes > 1 else ''} at {options.mfu:.0%} of "
        f"{options.device_tflops:g} TFLOP/s ({options.device_tflops_full:g} in fp32), disk at {options.disk_bandwidth:g} GB/s; "
        "without a device all memory is the host's. GiB are of 1024³ bytes, GB of 1000³"
    )


def _table(facts: dict[str, Any], options: EstimateOptions) -> Table:
    """A row for each step; at most 80 columns wide."""
    processes, limited = facts["processes"], options.device_memory is not None
    heads = ["device memory", "host memory", *([f"of all {processes}"] if processes > 1 else []), "disk written", "time"]
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, collapse_padding=True, title=Text(f"{options.load}: estimates for a rank"))
    table.add_column("step", min_width=STEP_WIDTH)
    for head in [*heads, *(["fits"] if limited else [])]:
        table.add_column("\n".join(_halves(head)), justify="right", no_wrap=True)
    for name, need in facts["steps"].items():
        device = shown_memory(need["device_memory_per_rank"]) if need["device_memory_per_rank"] else "none"
        host = [shown_memory(need["host_memory_first_rank"])]
        host += [shown_memory(need["host_memory"])] if processes > 1 else []
        row = [name, device, *host, shown_bytes(need["disk"]), shown_time(need["seconds"])]
        table.add_row(*row, *(["yes" if need["fits"] else "no"] if limited else []))
    return table


def _halves(head: str) -> tuple[str, ...]:
    """A title in lines that are no longer than what stands below it."""
    first, _, last = head.rpartition(" ")
    return (first, last) if first else (last,)


STEP_WIDTH = 10
"""Columns that the longest word of a step's name takes."""


def described(options: EstimateOptions, world: World) -> Described:
    """The model's sizes and family from a directory of either kind, or from a ``config.json`` alone."""
    path, dtype = Path(options.load), ElementType(ITEM_BYTES[options.target_params_dtype])
    beside: Told = told(options)
    if path.is_dir() and not model_folder.is_huggingface(path):
        from megatron_prune.opening.opened import open_either  # torch, which a configuration alone need not wait for

        model = open_either(options.load, world, beside)
        return Described(config=model.config, family=model.family, template=model.template, dtype=dtype)
    hf_config = model_folder.read_config(path if path.exists() else model_folder.fetch_config(options.load))
    family = family_of(hf_config)
    return Described(config=family.model_config(hf_config), family=family, template=hf_config, dtype=dtype)
