"""A model with a smaller vocabulary: rows of its matrices, its tokenizer, and every id in its files."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from megatron_prune.arch.sharding import ParallelLayout
from megatron_prune.checkpoint import both_versions, huggingface, model_folder
from megatron_prune.checkpoint.megatron import MegatronCheckpoint
from megatron_prune.checkpoint.tied_copy import check_tied_copy
from megatron_prune.config import flag
from megatron_prune.errors import InputError
from megatron_prune.files import staging
from megatron_prune.opening.foreign import told
from megatron_prune.opening.opened import Opened, open_with_vocabulary
from megatron_prune.opening.side_files import check_side_files, say_links
from megatron_prune.pruning.engines.huggingface import HuggingFaceEngine
from megatron_prune.pruning.engines.megatron import MegatronEngine
from megatron_prune.pruning.job import Job
from megatron_prune.pruning.measure import CalibrationOptions, Subject
from megatron_prune.pruning.procedure import pruned
from megatron_prune.pruning.request import Request
from megatron_prune.runtime.layout import run_layout
from megatron_prune.runtime.reporting import log
from megatron_prune.runtime.world import World
from megatron_prune.verbs.vocab_trim import VocabTrimOptions
from megatron_prune.vocabulary.choice import Chosen, choose, files_of, plan_of, show
from megatron_prune.vocabulary.folder import vocabulary_of
from megatron_prune.vocabulary.request import SelectOptions, check_select
from megatron_prune.vocabulary.selection import PRIOR
from megatron_prune.writing.cut import Form, write_cut
from megatron_prune.writing.huggingface import parse_size
from megatron_prune.writing.output import Output, staged
from megatron_prune.writing.overwrite import HUGGING_FACE, MEGATRON, check_output
from megatron_prune.writing.push import check_push


def vocab_trim(options: VocabTrimOptions, world: World) -> None:
    """Run the step; every process takes part.

    Raises:
        InputError: if the model, the counts, the request or the output do not do; nothing is written.
    """
    save = Path(options.save)
    check_select(options)
    parse_size(options.max_shard_size)
    chosen_otherwise = [*SelectOptions.CRITERIA, "multiple_of"]
    if options.plan and (options.prior != PRIOR or any(getattr(options, name) is not None for name in chosen_otherwise)):
        raise InputError("--plan and what else says which tokens stay", do="give one of the two")
    _check_fold(options)
    source = Path(options.load) if Path(options.load).exists() else None
    kind = MEGATRON if source and model_folder.is_megatron(source) and not options.tokenizer_only else HUGGING_FACE
    if options.tokenizer:
        staging.check_output(save, overwrite=options.overwrite, source=Path(options.tokenizer))
    check_output(save, kind, overwrite=options.overwrite, source=source)
    _check_written(options, kind is MEGATRON)
    model = open_with_vocabulary(options.load, world, tokenizer=options.tokenizer, beside=told(options))
    vocabulary = vocabulary_of(model)
    huggingface.side_files(vocabulary.folder)
    model.say_notes()
    if model.checkpoint is not None:
        say_links(model.path, world)
    push = check_push(options, world)
    chosen = choose(options, model, vocabulary, options.plan)
    if world.is_main:
        show(chosen)
    if model.checkpoint is None or options.tokenizer_only:
        _write_tokenizer(save, chosen, options, world)
    else:
        _write_model(save, model, chosen, options, world, hub_id=push and push.id)
    if world.is_main:
        log.info("%d of %d tokens: %s", len(chosen.trimmed.rows), chosen.trimmed.vocabulary.rows, save)
    if push:
        push.send(save, world)


def _check_written(options: VocabTrimOptions, to_megatron: bool) -> None:
    """Refuse what says how weights are written that are not."""
    if options.ckpt_format and not to_megatron:
        raise InputError("--ckpt-format has no effect: no Megatron checkpoint is written", do="leave it out")
    if to_megatron and options.push_to_hub:
        raise InputError(
            "--push-to-hub has no effect: a Megatron checkpoint is written", do="leave it out, and give it to export"
        )
    if (to_megatron or options.tokenizer_only) and options.max_shard_size != VocabTrimOptions.max_shard_size:
        raise InputError("--max-shard-size has no effect: no Hugging Face weights are written", do="leave it out")


def _write_tokenizer(save: Path, chosen: Chosen, options: VocabTrimOptions, world: World) -> None:
    output = Output(save=save, overwrite=options.overwrite, beside=files_of(chosen, options))
    with staged(world, output, HUGGING_FACE) as partial:
        world.on_main(lambda: huggingface.copy_side_files(chosen.trimmed.vocabulary.folder, partial))
        world.on_main(lambda: chosen.trimmed.write(partial))
        world.on_main(lambda: both_versions.rewrite_side_files(partial, len(chosen.trimmed.rows)))


def _check_fold(options: VocabTrimOptions) -> None:
    """Refuse text that nothing would look at, and a fold of nothing.

    Raises:
        InputError: naming the options.
    """
    text = {name: item for name, item in CalibrationOptions.__dataclass_fields__.items() if name != "data_field"}
    idle = [flag(name) for name, item in text.items() if getattr(options, name) != item.default]
    if idle and not options.fold:
        raise InputError(", ".join(idle) + " without --fold", do="leave it out, or pass --fold")
    if options.fold and options.tokenizer_only:
        raise InputError("--fold and --tokenizer-only", do="give one of the two")


def _write_model(
    save: Path, model: Opened, chosen: Chosen, options: VocabTrimOptions, world: World, *, hub_id: str | None
) -> None:
    layout, megatron_core = _layout(model, options, world), isinstance(model.checkpoint, MegatronCheckpoint)
    if megatron_core:
        check_side_files(world, model.path, model.checkpoint.manifest)
    else:
        check_tied_copy(model.checkpoint)
    engine = MegatronEngine(layout, world) if megatron_core else HuggingFaceEngine(model)
    plan = plan_of(chosen, model.config)
    job = Job(
        subject=Subject(model=model, engine=engine, tokenizer=chosen.trimmed.vocabulary.folder),
        request=Request(plan=plan.with_tokens_of(None), vocab_plan=plan, metric_of={}, rotate=False),
        options=options,
        measured=options.fold,
        fold=options.fold,
        trimmed=chosen.trimmed,
    )
    with pruned(job, save) as result:
        beside = files_of(replace(chosen, made_by=result.plan.vocab_record()), options)
        output = Output(save=save, beside=beside, overwrite=options.overwrite, strict=options.strict, check=not options.no_check)
        form = Form(ckpt_format=options.ckpt_format, max_shard_bytes=parse_size(options.max_shard_size), hub_id=hub_id)
        write_cut(output, model, result.plan, result.source, form, layout=layout, family=model.family, trimmed=chosen.trimmed)


def _layout(model: Opened, options: VocabTrimOptions, world: World) -> ParallelLayout:
    """How the model is divided: while it runs, if it does, and as it is written.

    Raises:
        InputError: if it cannot run on these processes.
    """
    if model.layout:
        return run_layout(model.layout, world, None, None) if options.fold else model.layout
    if options.fold and world.size > 1:
        raise InputError(
            "--fold of a Hugging Face model runs in one process", got=world.size, do="convert it, and trim the checkpoint"
        )
    return ParallelLayout()
