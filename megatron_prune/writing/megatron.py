"""A Megatron checkpoint, written by all processes."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Callable

import torch

from megatron_prune.arch.model import ModelConfig
from megatron_prune.arch.sharding import ParallelLayout
from megatron_prune.arch.tensors import EMBEDDING, TensorId
from megatron_prune.checkpoint import huggingface, megatron
from megatron_prune.checkpoint.huggingface import HuggingFaceModel
from megatron_prune.checkpoint.manifest import Manifest
from megatron_prune.checkpoint.options import TRANSFORMER_IMPLS
from megatron_prune.checkpoint.stream import StreamReport
from megatron_prune.opening.source import Source, run
from megatron_prune.runtime.world import World
from megatron_prune.vocabulary.trimmed import Trimmed
from megatron_prune.writing.check import check_megatron
from megatron_prune.writing.megatron_lm import say_flags
from megatron_prune.writing.output import Output, bytes_of, staged
from megatron_prune.writing.overwrite import MEGATRON


def write_megatron(
    world: World,
    output: Output,
    source: Source,
    *,
    config: ModelConfig,
    layout: ParallelLayout,
    dtypes: dict[TensorId, torch.dtype],
    ckpt_format: str,
    transformer_impl: str = TRANSFORMER_IMPLS[0],
    manifest: Callable[[StreamReport], Manifest],
    side_files: Path | None,
    trimmed: Trimmed | None = None,
    buffers_of: HuggingFaceModel | None = None,
    sizes: dict[tuple[str, int], list[int]] | None = None,
    plan_text: str | None = None,
) -> None:
    """Write a Megatron checkpoint; every process takes part.

    Args:
        manifest: makes the manifest from what all processes saw.
        side_files: directory whose configuration and tokenizer files go along.
        trimmed: the tokenizer that takes the place of theirs.
        buffers_of: the model whose stored rotary tables are kept, coming from Hugging Face.
        sizes: (axis, layer) → units of every rank, where shards are of unequal size.
        plan_text: the plan that made it.
    """

    def lay_out() -> None:
        folder = megatron.lay_out(
            partial,
            output.save,
            config,
            layout,
            dtypes,
            ckpt_format=ckpt_format,
            transformer_impl=transformer_impl,
            tokenizer=side_files is not None,
            sizes=sizes,
        )
        if side_files:
            (folder / megatron.HF_FOLDER).mkdir()
            huggingface.copy_side_files(side_files, folder / megatron.HF_FOLDER)
            if trimmed:
                trimmed.write(folder / megatron.HF_FOLDER)
        if buffers_of:
            huggingface.save_buffers(buffers_of, folder / megatron.HF_FOLDER)
        if plan_text:
            (folder / megatron.PLAN_FILE).write_text(plan_text, encoding="utf-8")

    with staged(world, output, MEGATRON, bytes_of(config, dtypes, side_files)) as partial:
        world.on_main(lay_out)
        folder = partial / megatron.RELEASE
        target = megatron.open_target(folder, config, layout, ckpt_format)
        report = run(world, source, target, label="writing", strict=output.strict)
        world.on_main(lambda: megatron.finish(folder, replace(manifest(report), digests=report.in_order(config))))
        if output.check:
            check_megatron(world, partial, config)
    if world.is_main and not (sizes and ckpt_format == "torch"):  # Megatron-LM reads no rank files of unequal size
        dtype = dtypes[EMBEDDING]
        say_flags(output.save, config, layout, dtype, ckpt_format=ckpt_format, transformer_impl=transformer_impl)
