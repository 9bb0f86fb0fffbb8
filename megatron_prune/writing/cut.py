"""What a plan leaves of a model, written as a checkpoint of its kind."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

import torch

from megatron_prune.arch.sharding import ParallelLayout
from megatron_prune.arch.tensors import TensorId, parameter_count, tensor_ids
from megatron_prune.checkpoint import megatron
from megatron_prune.checkpoint.manifest import Manifest
from megatron_prune.checkpoint.megatron import MegatronCheckpoint
from megatron_prune.checkpoint.options import TRANSFORMER_IMPLS
from megatron_prune.checkpoint.stream import StreamReport, content_id
from megatron_prune.evaluation.model_card import CardSubject, model_card
from megatron_prune.families.family import Family
from megatron_prune.opening.card import FILE as README
from megatron_prune.opening.card import card_facts
from megatron_prune.opening.opened import Opened
from megatron_prune.opening.source import Source
from megatron_prune.planning.plan import Plan
from megatron_prune.surgery.cut import Cut
from megatron_prune.vocabulary.trimmed import Trimmed
from megatron_prune.writing.huggingface import write_huggingface
from megatron_prune.writing.megatron import write_megatron
from megatron_prune.writing.output import Output


@dataclass(frozen=True, kw_only=True)
class Form:
    """What the files of a result are like.

    Attributes:
        ckpt_format, transformer_impl: of a Megatron checkpoint; the format is that of the source where none is said.
        max_shard_bytes: of a Hugging Face directory's weight files, at most.
        hub_id: what a Hugging Face directory is going to be called on the hub, if it is.
    """

    ckpt_format: str | None = None
    transformer_impl: str = TRANSFORMER_IMPLS[0]
    max_shard_bytes: int = 5 * 10**9
    hub_id: str | None = None


def write_cut(
    output: Output,
    model: Opened,
    plan: Plan,
    source: Source,
    form: Form,
    *,
    layout: ParallelLayout,
    family: Family,
    trimmed: Trimmed | None,
    losses: dict[str, float] | None = None,
) -> None:
    """Write what a plan leaves of a model as a checkpoint of the model's kind; every process takes part.

    Args:
        source: the pruned tensors.
        layout: how a Megatron checkpoint is divided.
        family: what the result is written as, or exported as later.
        trimmed: the tokenizer that goes with them, where the vocabulary is cut.
        losses: on held-out samples ``before`` and ``after``, nats a token, where they were measured, for the recipe.
    """
    cut = Cut(plan, model.config)
    entry = _entry(model, plan, cut, losses)
    common = {
        "config": cut.config,
        "dtypes": Source(tensors=model.tensors, origin=cut.origin).dtypes(cut.config, None),
        "side_files": trimmed.vocabulary.folder if trimmed else model.folder,
        "trimmed": trimmed,
    }
    source = _as_written(source, common["dtypes"])
    if isinstance(model.checkpoint, MegatronCheckpoint):
        write_megatron(
            model.world,
            output,
            source,
            layout=layout,
            ckpt_format=form.ckpt_format or model.checkpoint.format,
            transformer_impl=form.transformer_impl,
            manifest=lambda report: _manifest(model, plan, cut, layout, family, report, entry),
            sizes=plan.shard_sizes(),
            plan_text=plan.dumps(),
            **common,
        )
        return
    template = trimmed.config(model.checkpoint.hf_config) if trimmed else model.checkpoint.hf_config
    hf_config = family.hf_config(cut.config, template, _kept_layers(plan))
    recipe = [*model.recipe, entry]
    card = CardSubject(
        name=form.hub_id or output.save.name,
        config=cut.config,
        family=family.name,
        hf_config=hf_config,
        recipe=recipe,
        base_model=model.base_model,
        source=card_facts(model.folder, warn=model.world.is_main),
        side=common["side_files"],
    )
    write_huggingface(
        model.world,
        output,
        source,
        family=family,
        hf_config=hf_config,
        config_text=None,
        max_shard_bytes=form.max_shard_bytes,
        tied_head_stored=model.checkpoint.tied_head_stored,
        files={megatron.PLAN_FILE: plan.dumps(), README: model_card(card)},
        recipe=recipe,
        base_model=model.base_model,
        **common,
    )


def _entry(model: Opened, plan: Plan, cut: Cut, losses: dict[str, float] | None) -> dict[str, Any]:
    """What the recipe says of the cut, with the parameters and, where it is known, which model was cut."""
    entry, content_id = plan.recipe_entry(), model.recorded_identity or plan.content_id
    old, new = ({**entry[name], "parameters": parameter_count(of)} for name, of in (("old", model.config), ("new", cut.config)))
    more = {"content_id": content_id, "held_out_loss": losses}
    return {**entry, "old": old, "new": new, **{name: value for name, value in more.items() if value}}


def _as_written(source: Source, dtypes: dict[TensorId, torch.dtype]) -> Source:
    """The tensors in the element types that are written: the content id is then of what lies in the files, as whoever reads the
    model elsewhere finds it (what is re-fitted is float32 until here)."""
    change = source.transform or (lambda tensor, data, scratch: data)
    return dataclasses.replace(source, transform=lambda tensor, data, scratch: change(tensor, data, scratch).to(dtypes[tensor]))


def _manifest(
    model: Opened, plan: Plan, cut: Cut, layout: ParallelLayout, family: Family, report: StreamReport, entry: dict[str, Any]
) -> Manifest:
    before, kept = model.checkpoint.manifest, [entry.layer for entry in plan.layers]
    return dataclasses.replace(
        before,
        family=family.name,
        model=cut.config,
        layout=layout,
        content_id=content_id(report.digests),
        hf_dtypes=dtypes_after(before.hf_dtypes, cut),
        tied_head_stored=before.tied_head_stored and cut.config.tie_embeddings,
        kept_layers=[before.kept_layers[layer] for layer in kept] if before.kept_layers else _kept_layers(plan),
        recipe=[*before.recipe, entry],
        base_model=model.base_model,
    )


def _kept_layers(plan: Plan) -> list[int] | None:
    """Numbers of the layers that stay; ``None``: all do."""
    kept = [entry.layer for entry in plan.layers]
    return kept if len(kept) < plan.old["num_layers"] else None


def dtypes_after(recorded: dict[str, str], cut: Cut) -> dict[str, str]:
    """``hf_dtypes`` with the layers' numbers after the cut."""
    if not recorded:
        return {}
    others = {str(t): recorded[str(cut.origin(t))] for t in tensor_ids(cut.config) if str(cut.origin(t)) in recorded}
    return {"default": recorded["default"], **others}
