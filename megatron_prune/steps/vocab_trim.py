"""A model with a smaller vocabulary: rows of its matrices, its tokenizer, and every id in its files."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path

from megatron_prune.checkpoint import huggingface, staging
from megatron_prune.checkpoint.huggingface import HuggingFaceModel
from megatron_prune.config import option
from megatron_prune.errors import InputError
from megatron_prune.families.family import FAMILIES
from megatron_prune.runtime.world import World
from megatron_prune.steps import prune, prune_hf
from megatron_prune.steps.convert import check_tied_copy
from megatron_prune.steps.export import parse_size
from megatron_prune.steps.output import Source, log, staged
from megatron_prune.steps.vocab_options import (
    Chosen,
    Model,
    SelectOptions,
    check_select,
    choose,
    open_subject,
    plan_of,
    show,
)
from megatron_prune.surgery.cut import Cut
from megatron_prune.vocabulary.trimmed import Trimmed


@dataclass(frozen=True, kw_only=True)
class VocabTrimOptions(SelectOptions):
    """Cut the vocabulary of a Hugging Face model, a Megatron checkpoint at its own TP × PP, or a tokenizer alone."""

    save_dir: str = option("directory to write: of the same kind")
    plan: str | None = option("keep the tokens of this plan (of megatron-prune vocab select)", None)
    tokenizer_only: bool = option("write the tokenizer alone, no weights", False)
    ckpt_format: str | None = option(
        "layout of a Megatron result (default: that of the source)", None, choices=["torch_dist", "torch"]
    )
    max_shard_size: str = option("split weight files of a Hugging Face result larger than this", "5GB")
    overwrite: bool = option("replace an existing output directory", False)
    strict: bool = option("refuse weights that hold NaN or infinity instead of warning", False)


def vocab_trim(options: VocabTrimOptions, world: World) -> None:
    """Run the step; every process takes part.

    Raises:
        InputError: if the model, the counts, the request or the output do not do; nothing is written.
    """
    save = Path(options.save_dir)
    check_select(options)
    parse_size(options.max_shard_size)
    if options.plan and any(getattr(options, name) is not None for name in SelectOptions.CRITERIA):
        raise InputError("--plan and what else says which tokens stay", do="give one of the two")
    source = Path(options.load_dir) if Path(options.load_dir).exists() else None
    staging.check_output(save, overwrite=options.overwrite, source=source)
    model = open_subject(options.load_dir, options.tokenizer)
    chosen = choose(options, model, options.plan)
    if world.is_main:
        show(chosen, options)
    if model.checkpoint is None or options.tokenizer_only:
        _write_tokenizer(save, chosen.trimmed, options, world)
    else:
        _write_model(save, model, chosen, options, world)
    if world.is_main:
        log.info("%d of %d tokens: %s", len(chosen.trimmed.rows), chosen.trimmed.vocabulary.rows, save)


def _write_tokenizer(save: Path, trimmed: Trimmed, options: VocabTrimOptions, world: World) -> None:
    with staged(world, save, needed=0, overwrite=options.overwrite) as partial:
        if world.is_main:
            huggingface.copy_side_files(trimmed.vocabulary.folder, partial)
            trimmed.write(partial)


def _write_model(save: Path, model: Model, chosen: Chosen, options: VocabTrimOptions, world: World) -> None:
    plan, checkpoint = plan_of(chosen, model.config), model.checkpoint
    cut = Cut(plan, model.config)
    source = Source(tensors=checkpoint.tensors, origin=cut.origin, transform=cut.transform)
    common = {"trimmed": chosen.trimmed, "overwrite": options.overwrite, "strict": options.strict}
    if isinstance(checkpoint, HuggingFaceModel):
        check_tied_copy(checkpoint)
        shard_bytes = parse_size(options.max_shard_size)
        if options.tokenizer:
            checkpoint = dataclasses.replace(checkpoint, path=chosen.trimmed.vocabulary.folder)
        prune_hf.write_cut(save, checkpoint, checkpoint.family, plan, source, world, max_shard_bytes=shard_bytes, **common)
    else:
        family = FAMILIES.get(checkpoint.manifest.family)
        kind = options.ckpt_format
        prune.write_cut(save, checkpoint, checkpoint.layout, family, plan, source, world, ckpt_format=kind, **common)
