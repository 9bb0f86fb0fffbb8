"""Megatron → Megatron: another TP × PP, another format, another dtype; equal shards from unequal ones."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

from megatron_prune.arch.sharding import ParallelLayout
from megatron_prune.checkpoint import megatron
from megatron_prune.checkpoint.adapter import open_adapted
from megatron_prune.config import option, require_positive
from megatron_prune.files import staging
from megatron_prune.runtime.world import World
from megatron_prune.steps.output import CheckOptions, Source, check_side_files, write_megatron


@dataclass(frozen=True, kw_only=True)
class TransferOptions(CheckOptions):
    """Rewrite a Megatron checkpoint for another parallel layout, format or element type; merge an adapter."""

    load_dir: str = option("Megatron checkpoint: its root, or an iteration directory")
    save_dir: str = option("Megatron checkpoint to write")
    target_tensor_parallel_size: int = option("tensor-parallel ranks it is written for", 1)
    target_pipeline_parallel_size: int = option("pipeline stages it is written for", 1)
    target_params_dtype: str | None = option("element type (default: as stored)", None, choices=["fp32", "bf16", "fp16"])
    ckpt_format: str | None = option("checkpoint layout (default: that of the source)", None, choices=megatron.FORMATS)
    make_vocab_size_divisible_by: int | None = option(
        "the padded vocabulary is a multiple of this × the tensor-parallel size (default: that of the source)", None
    )
    base: str | None = option("model that an adapter belongs on (default: where it was when it was trained)", None)
    overwrite: bool = option("replace an existing output directory", False)
    strict: bool = option("refuse weights that hold NaN or infinity instead of warning", False)


def transfer(options: TransferOptions, world: World) -> None:
    """Run the step; every process takes part.

    Raises:
        InputError: on an argument, layout or checkpoint that does not fit; nothing is written.
    """
    require_positive(options, "target_tensor_parallel_size", "target_pipeline_parallel_size", "make_vocab_size_divisible_by")
    save = Path(options.save_dir)
    staging.check_output(save, overwrite=options.overwrite, source=Path(options.load_dir))
    checkpoint, adapter = open_adapted(Path(options.load_dir), Path(options.base) if options.base else None)
    check_side_files(world, checkpoint.path, checkpoint.manifest)
    layout = ParallelLayout(
        tensor=options.target_tensor_parallel_size,
        pipeline=options.target_pipeline_parallel_size,
        vocab_divisible_by=options.make_vocab_size_divisible_by or checkpoint.layout.vocab_divisible_by,
    )
    layout.check(checkpoint.config)
    source = Source(tensors=checkpoint.tensors, transform=adapter.merge if adapter else None)
    plan = checkpoint.path / megatron.PLAN_FILE
    write_megatron(
        world,
        save,
        source,
        config=checkpoint.config,
        layout=layout,
        dtypes=source.dtypes(checkpoint.config, options.target_params_dtype),
        ckpt_format=options.ckpt_format or checkpoint.format,
        manifest=lambda report: replace(checkpoint.manifest, layout=layout),
        side_files=checkpoint.hf_folder,
        plan_text=plan.read_text(encoding="utf-8") if plan.is_file() else None,
        overwrite=options.overwrite,
        strict=options.strict,
        check=not options.no_check,
    )
