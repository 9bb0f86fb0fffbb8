"""Megatron → Hugging Face: the way back, bit for bit where nothing was pruned."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import torch

from megatron_prune.arch.tensors import EMBEDDING, HEAD, TensorId, tensor_ids
from megatron_prune.checkpoint import huggingface, megatron
from megatron_prune.checkpoint.manifest import is_changed
from megatron_prune.checkpoint.megatron import MegatronCheckpoint
from megatron_prune.errors import InputError
from megatron_prune.evaluation.model_card import CardSubject, model_card
from megatron_prune.evaluation.record import read_evaluations
from megatron_prune.families.choice import choose_family
from megatron_prune.files.documents import read_text
from megatron_prune.opening.card import FILE as README
from megatron_prune.opening.card import card_facts
from megatron_prune.opening.named_model import named_model
from megatron_prune.opening.opened import Opened, open_merged
from megatron_prune.opening.side_files import say_links
from megatron_prune.opening.source import Source, commonest
from megatron_prune.runtime.reporting import log
from megatron_prune.runtime.world import World
from megatron_prune.serving.demand import warnings
from megatron_prune.verbs.export import ExportOptions
from megatron_prune.writing.huggingface import parse_size, write_huggingface
from megatron_prune.writing.output import Output, staged
from megatron_prune.writing.overwrite import HUGGING_FACE, check_output
from megatron_prune.writing.push import Push, check_push


def export(options: ExportOptions, world: World) -> None:
    """Run the step; every process takes part.

    Raises:
        InputError: on an argument or checkpoint that does not fit; nothing is written.
    """
    save = Path(options.save)
    read = (options.hf_dir, options.base, options.base_model_name, *options.evaluations)
    check_output(save, HUGGING_FACE, overwrite=options.overwrite, source=Path(options.load), inputs=read)
    shard_bytes = parse_size(options.max_shard_size)
    if options.base_model_name and not options.adapter_only:
        raise InputError("--base-model-name without --adapter-only", do="leave it out")
    model = open_merged(options.load, options.base, world, options)
    evaluations = _evaluations(options, model)
    push = check_push(options, world)
    if options.adapter_only:
        _write_adapter(options, model, evaluations, push, world)
    else:
        _write_model(options, model, evaluations, push, shard_bytes, world)
    if push:
        push.send(save, world)


def _evaluations(options: ExportOptions, model: Opened) -> list[dict[str, Any]]:
    """What was measured of the model, or of the one that was pruned, as entries of its recipe.

    Raises:
        InputError: if a file is of another model, or there is no card of ours that could say it.
    """
    if options.evaluations and not is_changed(model.recipe):
        raise InputError("--evaluations of a model as it was converted: its own card stays", do="leave it out")
    first = next((entry.get("content_id") for entry in model.recipe if "old" in entry), None)
    return read_evaluations(options.evaluations, {first: "the one that was pruned", model.recorded_identity: "this one"})


def _write_model(
    options: ExportOptions, model: Opened, evaluations: list[dict[str, Any]], push: Push | None, shard_bytes: int, world: World
) -> None:
    checkpoint, save = model.checkpoint, Path(options.save)
    side, template = model.folder, model.template
    family = choose_family(model.family, options.target_family, model.config)
    config = checkpoint.config
    hf_config = family.hf_config(config, template, checkpoint.manifest.kept_layers)
    if world.is_main:
        for line in warnings(config, family, template):
            log.warning("%s", line)
    dtypes = _dtypes(checkpoint, options.target_params_dtype)
    named = (template or {}).get("dtype") or (template or {}).get("torch_dtype")  # what a foreign checkpoint has besides
    stored = checkpoint.manifest.hf_dtypes.get("default", named)
    changed = is_changed(model.recipe)
    unchanged = not changed and hf_config == template and str(commonest(dtypes)) == f"torch.{stored}"
    if side is None and world.is_main:
        log.warning("no tokenizer is kept in %s; pass --hf-dir to add one", checkpoint.path)
    say_links(checkpoint.path, world)
    plan, recipe = checkpoint.plan_text(), [*model.recipe, *evaluations]
    files = {megatron.PLAN_FILE: plan} if plan is not None else {}
    if changed:
        name = push.id if push else save.name
        files[README] = model_card(_subject(model, recipe, name=name, family=family.name, hf_config=hf_config))
    write_huggingface(
        world,
        Output(save=save, overwrite=options.overwrite, strict=options.strict, check=not options.no_check),
        model.source(),
        config=config,
        family=family,
        hf_config=hf_config,
        config_text=read_text(side / "config.json") if unchanged else None,
        dtypes=dtypes,
        max_shard_bytes=shard_bytes,
        side_files=side,
        tied_head_stored=checkpoint.manifest.tied_head_stored,
        buffers={} if changed else huggingface.load_buffers(checkpoint.path / megatron.HF_FOLDER),
        files=files,
        recipe=recipe if changed else None,
        base_model=model.base_model,
        identity=model.recorded_identity,
    )


def _subject(model: Opened, recipe: list[dict[str, Any]], **of: Any) -> CardSubject:
    return CardSubject(
        config=model.config,
        recipe=recipe,
        content_id=model.recorded_identity,
        base_model=model.base_model,
        source=card_facts(model.folder, warn=model.world.is_main),
        side=model.folder,
        **of,
    )


def _write_adapter(
    options: ExportOptions, model: Opened, evaluations: list[dict[str, Any]], push: Push | None, world: World
) -> None:
    """Write the adapter with what is said of its model: its card, and the terms that hold for both."""
    adapter, save = model.adapter, Path(options.save)
    if adapter is None:
        raise InputError(f"--adapter-only: {options.load} is no adapter", do="leave it out")
    family = choose_family(model.family, options.target_family, model.config)
    named = named_model(model, options.base_model_name)
    check_output(save, HUGGING_FACE, overwrite=options.overwrite, inputs=(named,))
    if push and Path(named).is_dir():
        raise InputError(
            f"--push-to-hub of an adapter on {named}",
            got="a directory of this machine",
            needed="a model that others find too",
            do="upload that model, and name its id with --base-model-name",
        )
    recipe = [*model.recipe, *evaluations]
    of = {"name": push.id if push else save.name, "family": family.name, "adapter": adapter.config, "adapter_on": named}
    card = model_card(_subject(model, recipe, **of))

    def write(partial: Path) -> None:
        for name, file in huggingface.terms(model.folder).items() if model.folder else ():
            shutil.copyfile(file, partial / name)
        (partial / README).write_text(card, encoding="utf-8")
        adapter.write_peft(partial, family, named)

    with staged(world, Output(save=save, overwrite=options.overwrite), HUGGING_FACE) as partial:
        world.on_main(lambda: write(partial))
        if not options.no_check:
            world.on_main(lambda: adapter.check_peft(partial, family))
            if world.is_main:
                log.info("checked: %d matrices lie as they were written", 2 * len(adapter.matrices))


def _dtypes(checkpoint: MegatronCheckpoint, asked: str | None) -> dict[TensorId, torch.dtype]:
    if asked or not checkpoint.manifest.hf_dtypes:
        return Source(tensors=checkpoint.tensors).dtypes(checkpoint.config, asked)
    recorded = checkpoint.manifest.hf_dtypes
    names = {tensor: recorded.get(str(tensor), recorded["default"]) for tensor in tensor_ids(checkpoint.config)}
    if checkpoint.manifest.tied_head_stored:
        names[HEAD] = recorded.get(str(HEAD), names[EMBEDDING])
    return {tensor: getattr(torch, name) for tensor, name in names.items()}
