"""``recover`` at work: how a run is put together, begun or gone on with, and summed up."""

from __future__ import annotations

import dataclasses
import json
import shutil
import signal
import uuid
from dataclasses import replace
from pathlib import Path

import torch
import xxhash

from megatron_prune.arch.sharding import ParallelLayout
from megatron_prune.checkpoint import huggingface, megatron
from megatron_prune.checkpoint.adapter import read_matrices
from megatron_prune.checkpoint.manifest import FILE, AdapterOrigin, Manifest
from megatron_prune.checkpoint.tensor_map import TensorMap
from megatron_prune.errors import CheckpointError, InputError, PruneError
from megatron_prune.files import staging
from megatron_prune.files.documents import parse_json, read_json
from megatron_prune.opening.opened import Opened
from megatron_prune.planning.resources import training_flops
from megatron_prune.recovery.check import RUN_FILE, RunFile
from megatron_prune.recovery.checkpoints import Checkpoints, clean, iteration_name, newest
from megatron_prune.recovery.data import build_datasets
from megatron_prune.recovery.distillation import RunningTeacher, Teacher
from megatron_prune.recovery.hidden_match import HiddenMatch
from megatron_prune.recovery.history import History, peak_flops
from megatron_prune.recovery.lora import add_adapters
from megatron_prune.recovery.loss import Distillation
from megatron_prune.recovery.options import RecoverOptions
from megatron_prune.recovery.run import STEP_NAME, Intervals, Position, Run
from megatron_prune.recovery.settings import (
    adapter_config,
    batch_sizes,
    checkpoint_bytes,
    compute_dtype,
    data_options,
    hidden_pairs,
    optimizer_options,
    run_settings,
    sample_counts,
)
from megatron_prune.recovery.stored_logits import StoredTeacher
from megatron_prune.recovery.trainer import Step, Trainer
from megatron_prune.runtime.model import build_model, stop_parallel
from megatron_prune.runtime.reporting import log
from megatron_prune.runtime.world import World
from megatron_prune.writing.megatron_lm import say_flags
from megatron_prune.writing.overwrite import RUN, check_replaceable

SUMMARY = "summary.json"


def train(options: RecoverOptions, model: Opened, teaching: Opened | None, layout: ParallelLayout, world: World) -> int:
    """Begin the run, or go on with it, to its end.

    Args:
        teaching: the unpruned model that runs beside it, if one does.

    Returns:
        0, or 143 if it was asked to stop.
    """
    save, dtype = Path(options.save), compute_dtype(options)
    latest = None if options.overwrite else newest(save)
    position = position_of(latest) if latest else Position()
    if latest and world.is_main:
        ended = position.iteration >= options.train_iters
        log.info("the run is at its end, iteration %d" if ended else "going on after iteration %d", position.iteration)
    trainer = _trainer(options, _weights(options, model, latest), model, teaching, layout, world)
    checkpoints = Checkpoints(
        root=save,
        world=world,
        trainer=trainer,
        keep=options.keep,
        side_files=lambda folder: _copy_side_files(model, folder),
        tokenizer=model.folder is not None,
        needed=checkpoint_bytes(options, model),
        check=not options.no_check,
    )
    if latest:
        checkpoints.load(latest)
    _begin(options, model, world)
    train_set, valid_set, test_set = build_datasets(data_options(options), sample_counts(options), world)
    history = _history(options, model, dtype, world, position)
    run = Run(
        trainer=trainer,
        train=train_set,
        valid=valid_set,
        intervals=_intervals(options),
        checkpoints=checkpoints,
        describe=lambda where, step: describe(options, model, layout, where, step),
        history=history,
        position=position,
    )
    try:
        position = run.course()
        test_loss = None
        if test_set is not None and not run.stopped:
            test_loss = trainer.evaluate(test_set, options.eval_iters)[1]
    finally:
        if history:
            history.close()
    stop_parallel()
    if world.is_main:
        _sum_up(options, model, position, run, test_loss, history)
        if not run.stopped and not options.lora_r:
            say_flags(save, model.config, layout, dtype, ckpt_format="torch_dist")
    return 128 + signal.SIGTERM if run.stopped else 0


def _weights(options: RecoverOptions, model: Opened, latest: Path | None) -> TensorMap:
    """What the run starts from, or goes on from; of adapters, which lie beside the model, only that they are whole."""
    if latest is None:
        return model.tensors
    if not options.lora_r:
        return megatron.open_checkpoint(latest).tensors
    described = Manifest.load(latest / FILE)
    megatron.check_structure(latest, described)
    read_matrices(latest, described.digests)
    return model.tensors


def _trainer(
    options: RecoverOptions,
    tensors: TensorMap,
    model: Opened,
    teaching: Opened | None,
    layout: ParallelLayout,
    world: World,
) -> Trainer:
    """The model with these weights, running, and all that a step needs."""
    dtype, lora = compute_dtype(options), adapter_config(options)
    further = {
        "sequence_parallel": options.sequence_parallel and layout.tensor > 1,
        "recompute_granularity": options.recompute_granularity,
        "recompute_method": options.recompute_method,
        "recompute_num_layers": options.recompute_num_layers,
    }
    running = build_model(
        tensors, layout, world, dtype=dtype, seq_length=options.seq_length, local_layers=lora is not None, **further
    )
    teacher, hidden = _teacher(options, teaching, model, layout, world), None
    if options.hidden_weight:
        hidden = HiddenMatch(running.module, teacher.module, hidden_pairs(options, teaching, model))
    return Trainer(
        running=running,
        dtype=dtype,
        sizes=batch_sizes(options),
        seq_length=options.seq_length,
        seed=options.seed,
        optimizer_options=optimizer_options(options),
        teacher=teacher,
        distillation=Distillation(weight=options.distill_weight, temperature=options.distill_temperature),
        adapters=add_adapters(running, lora) if lora else [],
        hidden=hidden,
        hidden_weight=options.hidden_weight,
        answers_only=options.answers_only,
    )


def _begin(options: RecoverOptions, model: Opened, world: World) -> None:
    """Take the run's directory: emptied where asked to, free of what a killed run left, and note what the run is."""
    save, error = Path(options.save), None
    if world.is_main:
        there = save.exists()
        try:
            staging.hold(save.absolute())
            if options.overwrite:
                if not staging.unfinished(save):
                    check_replaceable(save, RUN, known=())
                staging.empty(save, last=RUN_FILE)
            clean(save)
            if not (save / RUN_FILE).is_file():
                noted = {"id": uuid.uuid4().hex, "settings": run_settings(options, model)}
                staging.write_text(save / RUN_FILE, json.dumps(noted, indent=2) + "\n")
        except OSError as found:
            if not there:
                shutil.rmtree(save, ignore_errors=True)
            error = InputError(f"{save} cannot be written", got=found.strerror or str(found))
        except InputError as found:
            error = found
    world.agree(error)


def _teacher(
    options: RecoverOptions, teaching: Opened | None, student: Opened, layout: ParallelLayout, world: World
) -> Teacher | None:
    if options.teacher_logits:
        return StoredTeacher(folder=Path(options.teacher_logits), vocab_size=student.config.vocab_size)
    if teaching is None:
        return None
    dtype = compute_dtype(options)
    return RunningTeacher(build_model(teaching.tensors, layout, world, dtype=dtype, seq_length=options.seq_length))


def _intervals(options: RecoverOptions) -> Intervals:
    return Intervals(
        train=options.train_iters,
        log=options.log_interval,
        save=options.save_interval,
        evaluate=options.eval_interval,
        evaluate_for=options.eval_iters,
        patience=options.early_stop,
    )


def _history(options: RecoverOptions, model: Opened, dtype: torch.dtype, world: World, position: Position) -> History | None:
    """On the main process; ``None`` elsewhere."""
    history, error = None, None
    if world.is_main:
        try:
            history = _open_history(options, model, dtype, world, position)
        except OSError as found:
            error = PruneError(f"the history cannot be written: {found}")
    world.agree(error)
    return history


def _open_history(options: RecoverOptions, model: Opened, dtype: torch.dtype, world: World, position: Position) -> History:
    history = History(
        folder=Path(options.save),
        identity=read_json(Path(options.save) / RUN_FILE, RunFile).id,
        train_iters=options.train_iters,
        tokens_per_step=options.global_batch_size * options.seq_length,
        flops_per_token=training_flops(model.config, options.seq_length),
        devices=world.size,
        peak=peak_flops(dtype),
        wandb=(options.wandb_project, run_settings(options, model)) if options.wandb_project else None,
    )
    history.open(-1 if position.start_loss is None else position.iteration)
    return history


def _copy_side_files(model: Opened, folder: Path) -> None:
    if model.folder:
        (folder / megatron.HF_FOLDER).mkdir()
        huggingface.copy_side_files(model.folder, folder / megatron.HF_FOLDER)
    if (plan := model.checkpoint.plan_text()) is not None:
        (folder / megatron.PLAN_FILE).write_text(plan, encoding="utf-8")


def describe(options: RecoverOptions, model: Opened, layout: ParallelLayout, position: Position, step: Step) -> Manifest:
    """The manifest of a checkpoint of the run; its id says what it was made from and how, until the weights are read again."""
    before = model.checkpoint.manifest
    settings = {name: value for name, value in run_settings(options, model).items() if value not in (None, [], False)}
    settings = {name: value for name, value in settings.items() if options.lora_r or not name.startswith("lora_")}
    entry = {
        "step": STEP_NAME,
        **dataclasses.asdict(position),
        "consumed_samples": position.iteration * options.global_batch_size,
        "tokens": position.iteration * options.global_batch_size * options.seq_length,
        "training_loss": step.losses[0],
        "settings": settings,
    }
    identity = "lineage-xxh3:" + xxhash.xxh3_128_hexdigest(json.dumps([before.content_id, entry], sort_keys=True).encode())
    lora, adapter = adapter_config(options), None
    if lora:
        adapter = AdapterOrigin(config=lora, base=str(model.path.absolute()), base_content_id=before.content_id)
    return replace(before, layout=layout, content_id=identity, recipe=[*before.recipe, entry], adapter=adapter)


def position_of(folder: Path) -> Position:
    """Where the run was when it wrote a checkpoint.

    Raises:
        CheckpointError: if its manifest does not say.
    """
    recipe = Manifest.load(folder / FILE).recipe
    entry = recipe[-1] if recipe and isinstance(recipe[-1], dict) else {}
    said = {item.name: entry[item.name] for item in dataclasses.fields(Position) if item.name in entry}
    position = parse_json(json.dumps(said), Position, f"{folder / FILE}, its last step")
    if entry.get("step") != STEP_NAME or iteration_name(position.iteration) != folder.name:
        raise CheckpointError(f"{folder / FILE}", got=f"iteration {position.iteration}", needed=f"that of {folder.name}")
    return position


def _sum_up(
    options: RecoverOptions,
    model: Opened,
    position: Position,
    run: Run,
    test_loss: float | None,
    history: History,
) -> None:
    """Write the summary, and say it."""
    measured = [record for record in history.records if "tokens_per_second" in record]
    summary = {
        "finished": not run.stopped,
        "iterations": position.iteration,
        "tokens": position.iteration * options.global_batch_size * options.seq_length,
        "start_loss": position.start_loss,
        "held_out_loss": position.held_out_loss,
        "best_loss": position.best_loss,
        "test_loss": test_loss,
        "tokens_per_second": sum(record["tokens_per_second"] for record in measured) / len(measured) if measured else None,
        "checkpoint": str(newest(Path(options.save))),
        "settings": run_settings(options, model),
    }
    try:
        staging.write_text(Path(options.save) / SUMMARY, json.dumps(summary, indent=2) + "\n")
    except OSError as error:
        raise PruneError(f"the summary cannot be written: {error}; the checkpoints are whole") from None
    if run.stopped:
        log.info("stopped as asked after %d iterations; the same command goes on from there", position.iteration)
        return
    if not options.no_check:
        log.info("checked: the weights of every checkpoint were read again before it was put in place")
    best = Path(options.save) / "best"
    log.info(
        "held-out loss %.5f → %.5f in %s tokens; newest checkpoint %s, best %s",
        position.start_loss,
        position.best_loss,
        f"{summary['tokens']:,}",
        summary["checkpoint"],
        best if best.exists() else "none",
    )
