"""Megatron → Megatron: another TP × PP, another format, another dtype; equal shards from unequal ones."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from megatron_prune.arch.sharding import ParallelLayout
from megatron_prune.config import check_limits
from megatron_prune.opening.opened import open_merged
from megatron_prune.opening.side_files import say_links
from megatron_prune.runtime.world import World
from megatron_prune.verbs.transfer import TransferOptions
from megatron_prune.writing.megatron import write_megatron
from megatron_prune.writing.output import Output
from megatron_prune.writing.overwrite import MEGATRON, check_output


def transfer(options: TransferOptions, world: World) -> None:
    """Run the step; every process takes part.

    Raises:
        InputError: on an argument, layout or checkpoint that does not fit; nothing is written.
    """
    check_limits(options)
    save = Path(options.save)
    check_output(save, MEGATRON, overwrite=options.overwrite, source=Path(options.load), inputs=(options.base,))
    model = open_merged(options.load, options.base, world, options)
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
