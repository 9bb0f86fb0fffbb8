"""Megatron → Megatron: another TP × PP, another format, another dtype; equal shards from unequal ones."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

from megatron_prune.arch.sharding import ParallelLayout
from megatron_prune.checkpoint import megatron
from megatron_prune.checkpoint.megatron_args import TRANSFORMER_IMPLS
from megatron_prune.config import option, require_positive
from megatron_prune.opening.foreign import ForeignOptions
from megatron_prune.opening.opened import open_merged
from megatron_prune.opening.side_files import say_links
from megatron_prune.runtime.world import World
from megatron_prune.writing.check import CheckOptions
from megatron_prune.writing.megatron import write_megatron
from megatron_prune.writing.output import Output
from megatron_prune.writing.overwrite import MEGATRON, check_output


@dataclass(frozen=True, kw_only=True)
class TransferOptions(ForeignOptions, CheckOptions):
    """Rewrite a Megatron checkpoint for another parallel layout, format or element type; merge an adapter."""

    load_dir: str = option("Megatron checkpoint: its root, or an iteration directory")
    save_dir: str = option("Megatron checkpoint to write")
    target_tensor_parallel_size: int = option("tensor-parallel ranks it is written for", 1)
    target_pipeline_parallel_size: int = option("pipeline stages it is written for", 1)
    target_params_dtype: str | None = option("element type (default: as stored)", None, choices=["fp32", "bf16", "fp16"])
    ckpt_format: str | None = option("checkpoint layout (default: that of the source)", None, choices=megatron.FORMATS)
    transformer_impl: str = option(
        "whose modules Megatron-LM is to load it into; torch_dist suits both", TRANSFORMER_IMPLS[0], choices=TRANSFORMER_IMPLS
    )
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
    check_output(save, MEGATRON, overwrite=options.overwrite, source=Path(options.load_dir), inputs=(options.base,))
    model = open_merged(options.load_dir, options.base, world, options)
    layout = ParallelLayout(
        tensor=options.target_tensor_parallel_size,
        pipeline=options.target_pipeline_parallel_size,
        vocab_divisible_by=options.make_vocab_size_divisible_by or model.layout.vocab_divisible_by,
    )
    layout.check(model.config)
    say_links(model.path, world)
    source, checkpoint = model.source(), model.checkpoint
    write_megatron(
        world,
        Output(save=save, overwrite=options.overwrite, strict=options.strict, check=not options.no_check),
        source,
        config=model.config,
        layout=layout,
        dtypes=source.dtypes(model.config, options.target_params_dtype),
        ckpt_format=options.ckpt_format or checkpoint.format,
        transformer_impl=options.transformer_impl,
        manifest=lambda report: replace(checkpoint.manifest, layout=layout),
        side_files=model.folder,
        plan_text=checkpoint.plan_text(),
    )
