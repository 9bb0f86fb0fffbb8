"""What ``recover`` refuses before anything is written, on every rank alike."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

from megatron_prune.arch.adapter import target_roles
from megatron_prune.arch.sharding import ParallelLayout
from megatron_prune.calibration.answers import has_mask
from megatron_prune.calibration.encoder import load_tokenizer, tokenizer_digest
from megatron_prune.calibration.pair import recorded_tokenizer
from megatron_prune.calibration.sources import check_seed
from megatron_prune.checkpoint import megatron
from megatron_prune.checkpoint.megatron import MegatronCheckpoint
from megatron_prune.config import require_positive
from megatron_prune.errors import InputError, raise_all
from megatron_prune.files import staging
from megatron_prune.recovery.checkpoints import check_room
from megatron_prune.recovery.data import check_data
from megatron_prune.recovery.stored_logits import check_parts, read_description
from megatron_prune.runtime.megatron_flags import check_megatron_flags
from megatron_prune.runtime.world import World
from megatron_prune.steps.output import log
from megatron_prune.steps.recover import RecoverOptions
from megatron_prune.steps.recovery_settings import (
    batch_sizes,
    checkpoint_bytes,
    data_options,
    hidden_pairs,
    optimizer_options,
    run_settings,
)
from megatron_prune.steps.teach import SHARED

RUN_FILE = "run.json"


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
            for prefix in filter(has_mask, () if options.answers_only else pairs):
                log.info("%s says which tokens are answers; all tokens count, for there is no --answers-only", prefix)
            if options.teacher_logits:
                samples = options.train_iters * options.global_batch_size
                check_parts(Path(options.teacher_logits), samples, options.seq_length)
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
    _check_adapter(options)
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
        f"--{name.replace('_', '-')} {value}, taught with {description['settings'].get(name)}"
        for name, value in own.items()
        if description["settings"].get(name) != value
    ]
    raise_all(
        InputError, f"{options.teacher_logits} was taught for another recovery", problems, do="use the same, or teach again"
    )


def _check_adapter(options: RecoverOptions) -> None:
    if options.lora_r is None:
        return
    require_positive(options, "lora_r")
    target_roles(options.lora_targets)
    if not 0 < options.lora_alpha < float("inf"):
        raise InputError("--lora-alpha", got=options.lora_alpha, needed="a positive number")
    if not 0 <= options.lora_dropout < 1:
        raise InputError("--lora-dropout", got=options.lora_dropout, needed="from 0 on, below 1")


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
                do=f"make it again with this model's: megatron-prune preprocess --tokenizer {checkpoint.path}; or, where the model's "
                "vocabulary was trimmed, renumber it: megatron-prune vocab remap",
            )


def _check_run(options: RecoverOptions, checkpoint: MegatronCheckpoint) -> None:
    """Refuse a directory that holds something else than the beginning of this run, or a disk without room for it."""
    save = Path(options.save)
    ours = (save / RUN_FILE).is_file()
    if not ours or options.overwrite:
        staging.check_output(save, overwrite=options.overwrite, source=Path(options.load))
    else:
        try:
            before = {"answers_only": False, **json.loads((save / RUN_FILE).read_text(encoding="utf-8"))["settings"]}
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
