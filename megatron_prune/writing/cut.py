"""What a plan leaves of a model, written as a checkpoint of its kind."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Mapping

from megatron_prune.arch.sharding import ParallelLayout
from megatron_prune.arch.tensors import tensor_ids
from megatron_prune.checkpoint import megatron
from megatron_prune.checkpoint.huggingface import HuggingFaceModel
from megatron_prune.checkpoint.manifest import Manifest, Recipe
from megatron_prune.checkpoint.megatron import MegatronCheckpoint
from megatron_prune.checkpoint.megatron_args import TRANSFORMER_IMPLS
from megatron_prune.checkpoint.stream import StreamReport, content_id
from megatron_prune.evaluation.model_card import model_card
from megatron_prune.families.family import Family
from megatron_prune.opening.source import Source
from megatron_prune.planning.plan import Plan
from megatron_prune.runtime.world import World
from megatron_prune.surgery.cut import Cut
from megatron_prune.vocabulary.trimmed import Trimmed
from megatron_prune.writing.huggingface import write_huggingface
from megatron_prune.writing.megatron import write_megatron


def write_megatron_cut(
    save: Path,
    checkpoint: MegatronCheckpoint,
    layout: ParallelLayout,
    family: Family,
    plan: Plan,
    source: Source,
    world: World,
    *,
    trimmed: Trimmed | None,
    ckpt_format: str | None,
    transformer_impl: str = TRANSFORMER_IMPLS[0],
    beside: Mapping[Path, bytes],
    overwrite: bool,
    strict: bool,
    check: bool,
) -> None:
    """Write what a plan leaves of a Megatron checkpoint; every process takes part.

    Args:
        source: the pruned tensors.
        trimmed: the tokenizer that goes with them, where the vocabulary is cut.
        ckpt_format: ``None``: that of the checkpoint.
        beside: files that appear together with it.
    """
    cut = Cut(plan, checkpoint.config)
    stored = Source(tensors=checkpoint.tensors, origin=cut.origin)

    def manifest(report: StreamReport) -> Manifest:
        before = checkpoint.manifest
        kept = [entry.layer for entry in plan.layers]
        original = [before.kept_layers[layer] for layer in kept] if before.kept_layers else kept
        return dataclasses.replace(
            before,
            family=family.name,
            model=cut.config,
            layout=layout,
            content_id=content_id(report.digests),
            hf_dtypes=dtypes_after(before.hf_dtypes, cut),
            tied_head_stored=before.tied_head_stored and cut.config.tie_embeddings,
            kept_layers=original if before.kept_layers or len(kept) < checkpoint.config.num_layers else None,
            recipe=[*before.recipe, plan.recipe_entry()],
        )

    write_megatron(
        world,
        save,
        source,
        config=cut.config,
        layout=layout,
        dtypes=stored.dtypes(cut.config, None),
        ckpt_format=ckpt_format or checkpoint.format,
        transformer_impl=transformer_impl,
        manifest=manifest,
        side_files=trimmed.vocabulary.folder if trimmed else checkpoint.hf_folder,
        trimmed=trimmed,
        sizes=plan.shard_sizes(),
        plan_text=plan.dumps(),
        beside=beside,
        overwrite=overwrite,
        strict=strict,
        check=check,
    )


def write_huggingface_cut(
    save: Path,
    model: HuggingFaceModel,
    family: Family,
    plan: Plan,
    source: Source,
    world: World,
    *,
    trimmed: Trimmed | None,
    max_shard_bytes: int,
    beside: Mapping[Path, bytes],
    overwrite: bool,
    strict: bool,
    check: bool,
) -> None:
    """Write what a plan leaves of a Hugging Face model; every process takes part.

    Args:
        source: the pruned tensors.
        trimmed: the tokenizer that goes with them, where the vocabulary is cut.
        beside: files that appear together with it.
    """
    cut = Cut(plan, model.config)
    template = trimmed.config(model.hf_config) if trimmed else model.hf_config
    dtypes = Source(tensors=model.tensors, origin=cut.origin).dtypes(cut.config, None)
    kept = [entry.layer for entry in plan.layers]
    hf_config = family.hf_config(cut.config, template, kept if len(kept) < model.config.num_layers else None)
    recipe = [*Recipe.load(model.path).recipe, plan.recipe_entry()]
    card = model_card(cut.config, recipe, name=save.name, family=family.name)
    write_huggingface(
        world,
        save,
        source,
        config=cut.config,
        family=family,
        hf_config=hf_config,
        config_text=None,
        dtypes=dtypes,
        max_shard_bytes=max_shard_bytes,
        side_files=trimmed.vocabulary.folder if trimmed else model.path,
        trimmed=trimmed,
        tied_head_stored=model.tied_head_stored,
        files={megatron.PLAN_FILE: plan.dumps(), "README.md": card},
        recipe=recipe,
        beside=beside,
        overwrite=overwrite,
        strict=strict,
        check=check,
    )


def dtypes_after(recorded: dict[str, str], cut: Cut) -> dict[str, str]:
    """``hf_dtypes`` with the layers' numbers after the cut."""
    if not recorded:
        return {}
    others = {str(t): recorded[str(cut.origin(t))] for t in tensor_ids(cut.config) if str(cut.origin(t)) in recorded}
    return {"default": recorded["default"], **others}
