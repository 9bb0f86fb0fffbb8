"""Hugging Face → Megatron, for any TP × PP, from any number of processes."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import torch

from megatron_prune.arch.sharding import ParallelLayout
from megatron_prune.arch.tensors import HEAD, TensorId
from megatron_prune.checkpoint import megatron, model_folder
from megatron_prune.checkpoint.manifest import Manifest
from megatron_prune.checkpoint.stream import StreamReport, content_id
from megatron_prune.checkpoint.tied_copy import check_tied_copy
from megatron_prune.config import check_limits
from megatron_prune.opening.opened import open_huggingface
from megatron_prune.opening.side_files import say_links
from megatron_prune.runtime.world import World
from megatron_prune.verbs.convert import ConvertOptions
from megatron_prune.writing.megatron import write_megatron
from megatron_prune.writing.output import Output
from megatron_prune.writing.overwrite import MEGATRON, check_output


def convert(options: ConvertOptions, world: World) -> None:
    """Run the step; every process takes part.

    Raises:
        InputError: on an argument, layout or checkpoint that does not fit; nothing is written.
    """
    check_limits(options)
    layout = ParallelLayout(
        tensor=options.target_tensor_parallel_size,
        pipeline=options.target_pipeline_parallel_size,
        vocab_divisible_by=options.make_vocab_size_divisible_by,
    )
    save = Path(options.save)
    folder = model_folder.resolve(options.load)
    check_output(save, MEGATRON, overwrite=options.overwrite, source=folder)
    say_links(folder, world)
    model = open_huggingface(folder, world)
    layout.check(model.config)
    check_tied_copy(model.checkpoint)
    source = model.source()

    def manifest(report: StreamReport) -> Manifest:
        return Manifest(
            family=model.family.name,
            model=model.config,
            layout=layout,
            content_id=model.recorded_identity or content_id(report.digests),
            hf_dtypes=describe_dtypes(megatron.stored_dtypes(model.tensors), model.checkpoint.tied_head_dtype),
            tied_head_stored=model.checkpoint.tied_head_stored,
            recipe=[*model.recipe, {"step": "convert", "from": Path(options.load).name}],
            base_model=model.base_model,
            converted_from=str(folder.absolute()),
        )

    write_megatron(
        world,
        Output(save=save, overwrite=options.overwrite, strict=options.strict, check=not options.no_check),
        source,
        config=model.config,
        layout=layout,
        dtypes=source.dtypes(model.config, options.target_params_dtype),
        ckpt_format=options.ckpt_format,
        transformer_impl=options.transformer_impl,
        manifest=manifest,
        side_files=model.folder,
        buffers_of=model.checkpoint,
    )


def describe_dtypes(dtypes: dict[TensorId, torch.dtype], tied_head: torch.dtype | None = None) -> dict[str, str]:
    """``{"default": the commonest, str(tensor): another, …}`` for a manifest; ``tied_head`` is that of a stored copy."""
    names = {tensor: str(dtype).removeprefix("torch.") for tensor, dtype in dtypes.items()}
    default = Counter(names.values()).most_common(1)[0][0]
    others = {str(tensor): name for tensor, name in names.items() if name != default}
    copied = {str(HEAD): str(tied_head).removeprefix("torch.")} if tied_head else {}
    return {"default": default, **others, **copied}
