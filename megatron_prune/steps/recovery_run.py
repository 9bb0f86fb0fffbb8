"""``steps/recover.py`` at work: what is checked before anything is written, and how a run is put together."""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import shutil
import signal
import uuid
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import xxhash

from megatron_prune.arch.adapter import AdapterConfig, target_roles
from megatron_prune.arch.model import ModelConfig
from megatron_prune.arch.sharding import ParallelLayout
from megatron_prune.arch.tensors import tensor_shape
from megatron_prune.calibration.encoder import load_tokenizer, tokenizer_digest
from megatron_prune.calibration.pair import recorded_tokenizer
from megatron_prune.calibration.sources import check_seed
from megatron_prune.checkpoint import megatron, staging
from megatron_prune.checkpoint.manifest import FILE, Manifest
from megatron_prune.checkpoint.megatron import MegatronCheckpoint
from megatron_prune.config import require_positive
from megatron_prune.errors import InputError, raise_all
from megatron_prune.planning.resources import Training, training_disk, training_flops
from megatron_prune.recovery.checkpoints import Checkpoints, check_room, clean, newest
from megatron_prune.recovery.data import BatchSizes, DataOptions, build_datasets, check_data
from megatron_prune.recovery.distillation import RunningTeacher, Teacher
from megatron_prune.recovery.hidden_match import HiddenMatch, layer_pairs
from megatron_prune.recovery.history import History, peak_flops
from megatron_prune.recovery.lora import add_adapters
from megatron_prune.recovery.loss import Distillation
from megatron_prune.recovery.optimizer import OptimizerOptions
from megatron_prune.recovery.run import STEP_NAME, Intervals, Position, Run
from megatron_prune.recovery.stored_logits import StoredTeacher, read_description
from megatron_prune.recovery.trainer import Step, Trainer
from megatron_prune.runtime.megatron_flags import check_megatron_flags
from megatron_prune.runtime.model import build_model, stop_parallel
from megatron_prune.runtime.world import World
from megatron_prune.steps.output import log
from megatron_prune.steps.recover import FREE, RecoverOptions
from megatron_prune.steps.teach import SHARED

RUN_FILE, SUMMARY = "run.json", "summary.json"


def check(options: RecoverOptions, checkpoint: MegatronCheckpoint, layout: ParallelLayout, world: World) -> None:
    """Refuse what does not fit, on every rank alike.

    Raises:
        InputError: on arguments, layout, teacher, data or a directory; nothing is written.
    """
    _check_arguments(options, checkpoint, layout, world)
    error = None
    if world.is_main:
        try:
            pairs = check_data(data_options(options), checkpoint.config.vocab_size)
            _check_tokenizer(list(pairs), checkpoint)
            _check_run(options, checkpoint)
        except InputError as found:
            error = found
    world.agree(error)


def _check_arguments(options: RecoverOptions, checkpoint: MegatronCheckpoint, layout: ParallelLayout, world: World) -> None:
    """What can be refused without looking at the data, on every rank alike."""
    config = checkpoint.config
    check_megatron_flags(options.megatron, config)
    layout.check(config)
    if not 2 <= options.seq_length <= config.max_position_embeddings:
        raise InputError("--seq-length", got=options.seq_length, needed=f"2 to the model's {config.max_position_embeddings}")
    if options.sequence_parallel and options.seq_length % layout.tensor:
        raise InputError(
            "--sequence-parallel", got=f"{options.seq_length} tokens", needed=f"a multiple of the {layout.tensor} ranks"
        )
    if options.bf16 and options.fp16:
        raise InputError("--bf16 and --fp16", do="choose one")
    _check_recompute(options, config.num_layers // layout.pipeline)
    if options.early_stop < 0:
        raise InputError("--early-stop", got=options.early_stop, needed="0 or more")
    check_seed(options.seed)
    batch_sizes(options).check(world.size // (layout.tensor * layout.pipeline))
    optimizer_options(options).check()
    _check_adapter(options, config, layout)
    if options.wandb_project and not importlib.util.find_spec("wandb"):
        raise InputError("--wandb-project needs a package", do="pip install wandb, or leave it out")
    if options.teacher and options.teacher_logits:
        raise InputError("--teacher and --teacher-logits", do="choose one")
    if not 0 <= options.distill_weight <= 1:
        raise InputError("--distill-weight", got=options.distill_weight, needed="0 to 1")
    if not 0 < options.distill_temperature < float("inf"):
        raise InputError("--distill-temperature", got=options.distill_temperature, needed="a positive number")
    if not 0 <= options.hidden_weight < float("inf"):
        raise InputError("--hidden-weight", got=options.hidden_weight, needed="0 or more")
    if options.hidden_weight and not options.teacher:
        raise InputError("--hidden-weight without --teacher", do="name the unpruned checkpoint")
    if options.teacher:
        teacher = check_teacher(options.teacher, checkpoint, layout)
        if options.hidden_weight:
            _check_hidden(options, teacher, checkpoint, layout)
    if options.teacher_logits:
        _check_answers(options, checkpoint)


def check_teacher(path: str, student: MegatronCheckpoint, layout: ParallelLayout) -> MegatronCheckpoint:
    """Open the teacher and see that it can teach this student.

    Raises:
        InputError: if its vocabulary is another, or it does not divide over the layout.
    """
    teacher = megatron.open_checkpoint(Path(path))
    if teacher.config.vocab_size != student.config.vocab_size:
        raise InputError(
            f"--teacher {path} has another vocabulary than the student",
            got=f"{teacher.config.vocab_size} tokens",
            needed=f"{student.config.vocab_size}",
            do="distil before the vocabulary is cut, or from a teacher whose vocabulary was cut alike",
        )
    layout.check(teacher.config, "the teacher")
    return teacher


def _check_hidden(
    options: RecoverOptions, teacher: MegatronCheckpoint, student: MegatronCheckpoint, layout: ParallelLayout
) -> None:
    if layout.pipeline > 1:
        raise InputError("--hidden-weight", got=f"{layout.pipeline} pipeline stages", needed="one: layers are compared on one")
    if options.recompute_granularity == "full":
        raise InputError("--hidden-weight and --recompute-granularity full", do="use selective: what is compared must be kept")
    hidden_pairs(options, teacher, student)


def hidden_pairs(options: RecoverOptions, teacher: MegatronCheckpoint, student: MegatronCheckpoint) -> list[tuple[int, int]]:
    """Layers that are compared, (student's, teacher's)."""
    kept = student.manifest.kept_layers
    return layer_pairs(student.config.num_layers, teacher.config.num_layers, kept, options.hidden_layers)


def _check_recompute(options: RecoverOptions, layers: int) -> None:
    """``layers``: of a stage."""
    how = (options.recompute_method, options.recompute_num_layers)
    if options.recompute_granularity != "full" and how != (None, None):
        raise InputError("--recompute-method and --recompute-num-layers", do="pass --recompute-granularity full with them")
    if options.recompute_num_layers and options.recompute_num_layers > layers:
        raise InputError("--recompute-num-layers", got=options.recompute_num_layers, needed=f"at most a stage's {layers} layers")
    if options.recompute_method == "uniform" and layers % options.recompute_num_layers:
        raise InputError(
            "--recompute-num-layers", got=options.recompute_num_layers, needed=f"a number that divides {layers} layers"
        )


def _check_answers(options: RecoverOptions, student: MegatronCheckpoint) -> None:
    description = read_description(Path(options.teacher_logits))
    if description["vocab_size"] != student.config.vocab_size:
        raise InputError(
            f"--teacher-logits {options.teacher_logits} are of another vocabulary than the student's",
            got=f"{description['vocab_size']} tokens",
            needed=f"{student.config.vocab_size}",
        )
    own = json.loads(json.dumps({name: getattr(options, name) for name in SHARED}))
    problems = [
        f"--{name.replace('_', '-')} {own[name]}, taught with {taught}"
        for name, taught in description["settings"].items()
        if own[name] != taught
    ]
    raise_all(
        InputError, f"{options.teacher_logits} was taught for another recovery", problems, do="use the same, or teach again"
    )


def _check_tokenizer(prefixes: list[str], checkpoint: MegatronCheckpoint) -> None:
    """Refuse pairs that say that another tokenizer made them than the one the checkpoint keeps."""
    said = {prefix: recorded_tokenizer(prefix) for prefix in prefixes}
    if checkpoint.hf_folder is None or not any(said.values()):
        return
    try:
        own = tokenizer_digest(load_tokenizer(checkpoint.hf_folder))
    except InputError:  # it keeps a configuration alone
        return
    for prefix, made in said.items():
        if made and made["digest"] != own:
            raise InputError(
                f"{prefix}.bin was made with a tokenizer that is not the model's",
                got=f"{made['name']} of {made['vocab_size']} tokens",
                do="make it again with this model's: megatron-prune preprocess --tokenizer " + str(checkpoint.path),
            )


def _check_run(options: RecoverOptions, checkpoint: MegatronCheckpoint) -> None:
    """Refuse a directory that holds something else than the beginning of this run, or a disk without room for it."""
    save = Path(options.save)
    ours = (save / RUN_FILE).is_file()
    if not ours or options.overwrite:
        staging.check_output(save, overwrite=options.overwrite, source=Path(options.load))
    else:
        try:
            before = json.loads((save / RUN_FILE).read_text(encoding="utf-8"))["settings"]
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise InputError(f"{save / RUN_FILE} is damaged", got=repr(error), do="pass --overwrite to begin anew") from None
        problems = [
            f"--{name.replace('_', '-')} {value}, begun with {before.get(name)}"
            for name, value in run_settings(options, checkpoint).items()
            if before.get(name) != value
        ]
        raise_all(
            InputError,
            f"{save} holds a run that was begun with other settings",
            problems,
            do="go on with those; or name another --save, and to start from a checkpoint of it --load it",
        )
    check_room(save, checkpoint_bytes(options, checkpoint))


def run_settings(options: RecoverOptions, checkpoint: MegatronCheckpoint) -> dict[str, Any]:
    """What a run is, JSON-able: it may not change when the run goes on."""
    settings = {item.name: getattr(options, item.name) for item in dataclasses.fields(options) if item.name not in FREE}
    settings["start"] = checkpoint.manifest.content_id
    return json.loads(json.dumps(settings))


def checkpoint_bytes(options: RecoverOptions, checkpoint: MegatronCheckpoint) -> int:
    """Of one checkpoint of the run, at most."""
    if options.lora_r:
        lora = adapter_config(options)
        each = sum(sum(tensor_shape(role, checkpoint.config)) for role in lora.roles)
        return 16 * lora.r * each * checkpoint.config.num_layers
    return training_disk(checkpoint.config, Training(mixed_precision=options.bf16 or options.fp16))


def batch_sizes(options: RecoverOptions) -> BatchSizes:
    """Of the steps."""
    return BatchSizes(global_batch=options.global_batch_size, micro_batch=options.micro_batch_size)


def optimizer_options(options: RecoverOptions) -> OptimizerOptions:
    """The optimizer's part of the options."""
    return OptimizerOptions(**{item.name: getattr(options, item.name) for item in dataclasses.fields(OptimizerOptions)})


def data_options(options: RecoverOptions) -> DataOptions:
    """The part of the options that says what is trained and measured on."""
    names = [item.name for item in dataclasses.fields(DataOptions) if item.name != "cache"]
    cache = Path(options.data_cache_path or Path(options.save) / "data_cache")
    return DataOptions(**{name: getattr(options, name) for name in names}, cache=cache)


def adapter_config(options: RecoverOptions) -> AdapterConfig | None:
    """What adapters are trained, if any."""
    if options.lora_r is None:
        return None
    return AdapterConfig(
        r=options.lora_r,
        alpha=options.lora_alpha,
        dropout=options.lora_dropout,
        roles=target_roles(options.lora_targets),
        seed=options.seed,
    )


def _check_adapter(options: RecoverOptions, config: ModelConfig, layout: ParallelLayout) -> None:
    if options.lora_r is None:
        return
    require_positive(options, "lora_r")
    target_roles(options.lora_targets)
    if not 0 < options.lora_alpha < float("inf"):
        raise InputError("--lora-alpha", got=options.lora_alpha, needed="a positive number")
    if not 0 <= options.lora_dropout < 1:
        raise InputError("--lora-dropout", got=options.lora_dropout, needed="from 0 on, below 1")
    if config.num_query_groups % layout.tensor:
        raise InputError(
            f"--lora-r under TP {layout.tensor}",
            got=f"{config.num_query_groups} KV groups",
            needed="whole KV groups on every rank",
            do=f"use a tensor-parallel size that divides {config.num_query_groups}",
        )


def compute_dtype(options: RecoverOptions) -> torch.dtype:
    """What the run computes in."""
    return torch.bfloat16 if options.bf16 else torch.float16 if options.fp16 else torch.float32


def train(options: RecoverOptions, checkpoint: MegatronCheckpoint, layout: ParallelLayout, world: World) -> int:
    """Begin the run, or go on with it, to its end.

    Returns:
        0, or 143 if it was asked to stop.
    """
    save = Path(options.save)
    _begin(options, checkpoint, world)
    latest = newest(save)
    position = position_of(Manifest.load(latest / FILE)) if latest else Position()
    tensors = megatron.open_checkpoint(latest).tensors if latest and not options.lora_r else checkpoint.tensors
    dtype = compute_dtype(options)
    if latest and world.is_main:
        ended = position.iteration >= options.train_iters
        log.info("the run is at its end, iteration %d" if ended else "going on after iteration %d", position.iteration)
    further = {
        "sequence_parallel": options.sequence_parallel and layout.tensor > 1,
        "recompute_granularity": options.recompute_granularity,
        "recompute_method": options.recompute_method,
        "recompute_num_layers": options.recompute_num_layers,
    }
    lora = adapter_config(options)
    running = build_model(
        tensors, layout, world, dtype=dtype, seq_length=options.seq_length, local_layers=lora is not None, **further
    )
    teacher, hidden = _teacher(options, checkpoint, layout, world, dtype), None
    if options.hidden_weight:
        pairs = hidden_pairs(options, megatron.open_checkpoint(Path(options.teacher)), checkpoint)
        hidden = HiddenMatch(running.module, teacher.module, pairs)
    trainer = Trainer(
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
    )
    checkpoints = Checkpoints(
        root=save,
        world=world,
        trainer=trainer,
        keep=options.keep,
        side_files=lambda folder: _copy_side_files(checkpoint, folder),
        needed=checkpoint_bytes(options, checkpoint),
    )
    if latest:
        checkpoints.load(latest)
    train_set, valid_set, test_set = build_datasets(data_options(options), _samples(options))
    history = _history(options, checkpoint, dtype, world, position) if world.is_main else None
    run = Run(
        trainer=trainer,
        train=train_set,
        valid=valid_set,
        intervals=_intervals(options),
        checkpoints=checkpoints,
        describe=lambda where, step: describe(options, checkpoint, layout, where, step),
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
        _sum_up(options, checkpoint, position, run, test_loss, history)
    return 128 + signal.SIGTERM if run.stopped else 0


def _begin(options: RecoverOptions, checkpoint: MegatronCheckpoint, world: World) -> None:
    """Take the run's directory: emptied where asked to, free of what a killed run left, and note what the run is."""
    save, error = Path(options.save), None
    if world.is_main:
        try:
            staging.hold(save.absolute())
            if options.overwrite:
                for entry in save.iterdir():
                    shutil.rmtree(entry) if entry.is_dir() and not entry.is_symlink() else entry.unlink()
            clean(save)
            begun = json.loads((save / RUN_FILE).read_text(encoding="utf-8")) if (save / RUN_FILE).is_file() else {}
            noted = {"id": begun.get("id") or uuid.uuid4().hex, "settings": run_settings(options, checkpoint)}
            staging.write_text(save / RUN_FILE, json.dumps(noted, indent=2) + "\n")
        except (InputError, OSError) as found:
            error = found
    world.agree(error)


def _teacher(
    options: RecoverOptions, student: MegatronCheckpoint, layout: ParallelLayout, world: World, dtype: torch.dtype
) -> Teacher | None:
    if options.teacher_logits:
        return StoredTeacher(folder=Path(options.teacher_logits))
    if not options.teacher:
        return None
    teacher = check_teacher(options.teacher, student, layout)
    return RunningTeacher(build_model(teacher.tensors, layout, world, dtype=dtype, seq_length=options.seq_length))


def _intervals(options: RecoverOptions) -> Intervals:
    return Intervals(
        train=options.train_iters,
        log=options.log_interval,
        save=options.save_interval,
        evaluate=options.eval_interval,
        evaluate_for=options.eval_iters,
        patience=options.early_stop,
    )


def _samples(options: RecoverOptions) -> tuple[int, int, int]:
    held_out = options.eval_iters * options.global_batch_size
    return options.train_iters * options.global_batch_size, held_out, held_out


def _history(
    options: RecoverOptions, checkpoint: MegatronCheckpoint, dtype: torch.dtype, world: World, position: Position
) -> History:
    history = History(
        folder=Path(options.save),
        identity=json.loads((Path(options.save) / RUN_FILE).read_text(encoding="utf-8"))["id"],
        train_iters=options.train_iters,
        tokens_per_step=options.global_batch_size * options.seq_length,
        flops_per_token=training_flops(checkpoint.config, options.seq_length),
        devices=world.size,
        peak=peak_flops(dtype),
        wandb=(options.wandb_project, run_settings(options, checkpoint)) if options.wandb_project else None,
    )
    history.open(-1 if position.start_loss is None else position.iteration)
    return history


def _copy_side_files(checkpoint: MegatronCheckpoint, folder: Path) -> None:
    if checkpoint.hf_folder:
        shutil.copytree(checkpoint.hf_folder, folder / megatron.HF_FOLDER)
    if (checkpoint.path / megatron.PLAN_FILE).is_file():
        shutil.copyfile(checkpoint.path / megatron.PLAN_FILE, folder / megatron.PLAN_FILE)


def describe(
    options: RecoverOptions, checkpoint: MegatronCheckpoint, layout: ParallelLayout, position: Position, step: Step
) -> Manifest:
    """The manifest of a checkpoint of the run."""
    before = checkpoint.manifest
    settings = {name: value for name, value in run_settings(options, checkpoint).items() if value not in (None, [], False)}
    entry = {
        "step": STEP_NAME,
        **dataclasses.asdict(position),
        "consumed_samples": position.iteration * options.global_batch_size,
        "tokens": position.iteration * options.global_batch_size * options.seq_length,
        "training_loss": step.losses[0],
        "settings": settings,
    }
    identity = xxhash.xxh3_128_hexdigest(json.dumps([before.content_id, entry], sort_keys=True).encode())
    lora, adapter = adapter_config(options), None
    if lora:
        adapter = {"config": lora.to_json(), "base": str(checkpoint.path.absolute()), "base_content_id": before.content_id}
    return replace(before, layout=layout, content_id=identity, recipe=[*before.recipe, entry], adapter=adapter)


def position_of(described: Manifest) -> Position:
    """Where the run was when it wrote a checkpoint."""
    entry = described.recipe[-1]
    return Position(**{item.name: entry[item.name] for item in dataclasses.fields(Position)})


def _sum_up(
    options: RecoverOptions,
    checkpoint: MegatronCheckpoint,
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
        "settings": run_settings(options, checkpoint),
    }
    staging.write_text(Path(options.save) / SUMMARY, json.dumps(summary, indent=2) + "\n")
    if run.stopped:
        log.info("stopped as asked after %d iterations; the same command goes on from there", position.iteration)
        return
    best = Path(options.save) / "best"
    log.info(
        "held-out loss %.5f → %.5f in %s tokens; newest checkpoint %s, best %s",
        position.start_loss,
        position.best_loss,
        f"{summary['tokens']:,}",
        summary["checkpoint"],
        best if best.exists() else "none",
    )
