"""What ``recover`` refuses before anything is written, on every rank alike."""

from __future__ import annotations

import importlib.util
import json
import os
import tempfile
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from megatron_prune.arch.adapter import target_roles
from megatron_prune.arch.sharding import ParallelLayout
from megatron_prune.checkpoint import megatron
from megatron_prune.config import flag
from megatron_prune.errors import CheckpointError, InputError, raise_all
from megatron_prune.files import staging
from megatron_prune.files.documents import STRICT, read_json, shorten
from megatron_prune.opening.opened import Opened
from megatron_prune.recovery.data import build_alone, check_data
from megatron_prune.recovery.flags import SHARED
from megatron_prune.recovery.history import HISTORY, read_history
from megatron_prune.recovery.index_cache import check_place
from megatron_prune.recovery.options import RecoverOptions, check_passes
from megatron_prune.recovery.settings import (
    batch_sizes,
    checkpoint_bytes,
    data_options,
    hidden_pairs,
    optimizer_options,
    run_settings,
    sample_counts,
)
from megatron_prune.recovery.stored_logits import check_answers, check_parts, read_description
from megatron_prune.runtime.megatron_flags import check_megatron_flags
from megatron_prune.runtime.reporting import log
from megatron_prune.runtime.world import World
from megatron_prune.text.answers import has_mask
from megatron_prune.text.encoder import load_tokenizer, tokenizer_digest
from megatron_prune.text.pair import recorded_tokenizer
from megatron_prune.text.sources import check_seed
from megatron_prune.writing.overwrite import RUN, check_output

RUN_FILE = "run.json"


@dataclass(frozen=True, kw_only=True)
class RunFile:
    """What ``run.json`` says of a run: its name among all, and what may not change when it goes on."""

    __pydantic_config__ = STRICT

    id: str
    settings: dict[str, Any]


def check(options: RecoverOptions, model: Opened, layout: ParallelLayout, world: World) -> Opened | None:
    """Refuse what does not fit, on every rank alike.

    Returns:
        The teacher that runs beside the model, if one does.

    Raises:
        InputError: on arguments, layout, teacher, data or a directory; nothing is written.
    """
    teacher, error = _check_arguments(options, model, layout, world), None
    if world.is_main:
        try:
            data = data_options(options)
            pairs = check_data(data, model.config.vocab_size)
            check_tokenizer(list(pairs), model)
            check_place(data.cache)
            for prefix in filter(has_mask, () if options.answers_only else pairs):
                log.info("%s says which tokens are answers; all tokens count, for there is no --answers-only", prefix)
            _check_run(options, model)
            if options.teacher_logits:
                _check_answers(options, model)
        except InputError as found:
            error = found
    world.agree(error)
    return teacher


def _check_arguments(options: RecoverOptions, model: Opened, layout: ParallelLayout, world: World) -> Opened | None:
    """What can be refused without looking at the data, on every rank alike; the teacher."""
    config = model.config
    check_megatron_flags(options.megatron, config)
    layout.check(config)
    if not 2 <= options.seq_length <= config.max_position_embeddings:
        raise InputError("--seq-length", got=options.seq_length, needed=f"2 to the model's {config.max_position_embeddings}")
    check_passes(options, layout, config.num_layers)
    check_seed(options.seed)
    batch_sizes(options).check(world.size // (layout.tensor * layout.pipeline))
    optimizer_options(options).check()
    _check_adapter(options)
    if options.wandb_project and not importlib.util.find_spec("wandb"):
        raise InputError("--wandb-project needs a package", do="pip install wandb, or leave it out")
    if options.teacher and options.teacher_logits:
        raise InputError("--teacher and --teacher-logits", do="choose one")
    if options.hidden_weight and not options.teacher:
        raise InputError("--hidden-weight without --teacher", do="name the unpruned checkpoint")
    if not options.teacher:
        return None
    teacher = open_teacher(options.teacher, model, layout)
    if options.hidden_weight:
        _check_hidden(options, teacher, model, layout)
    return teacher


def open_teacher(path: str, student: Opened, layout: ParallelLayout) -> Opened:
    """Open the teacher and see that it can teach this student.

    Raises:
        InputError: if its vocabulary is another, or it does not divide over the layout.
    """
    try:
        checkpoint = megatron.open_checkpoint(Path(path))
    except CheckpointError as error:
        do = "--hf-dir is about --load; megatron-prune transfer --hf-dir makes a teacher that says all itself"
        raise CheckpointError(f"--teacher: {error}", do=do if "--hf-dir" in str(error) else None) from None
    teacher = Opened(path=checkpoint.path, checkpoint=checkpoint, world=student.world)
    if teacher.config.vocab_size != student.config.vocab_size:
        raise InputError(
            f"--teacher {path} has another vocabulary than the student",
            got=f"{teacher.config.vocab_size} tokens",
            needed=f"{student.config.vocab_size}",
            do="distil before the vocabulary is cut, or from a teacher whose vocabulary was cut alike",
        )
    layout.check(teacher.config, "the teacher")
    return teacher


def _check_hidden(options: RecoverOptions, teacher: Opened, student: Opened, layout: ParallelLayout) -> None:
    if layout.pipeline > 1:
        raise InputError("--hidden-weight", got=f"{layout.pipeline} pipeline stages", needed="one: layers are compared on one")
    if options.recompute_granularity == "full":
        raise InputError("--hidden-weight and --recompute-granularity full", do="use selective: what is compared must be kept")
    hidden_pairs(options, teacher, student)


def _check_answers(options: RecoverOptions, student: Opened) -> None:
    folder, vocab_size = Path(options.teacher_logits), student.config.vocab_size
    description = read_description(folder)
    if description.vocab_size != vocab_size:
        raise InputError(
            f"--teacher-logits {options.teacher_logits} are of another vocabulary than the student's",
            got=f"{description.vocab_size} tokens",
            needed=f"{vocab_size}",
        )
    own = json.loads(json.dumps({name: getattr(options, name) for name in SHARED}))
    problems = [
        f"{flag(name)} {value}, taught with {_shown(description.settings.get(name))}"
        for name, value in own.items()
        if description.settings.get(name) != value
    ]
    raise_all(InputError, f"{folder} was taught for another recovery", problems, do="use the same, or teach again")
    counts = sample_counts(options)
    check_parts(folder, counts[0], options.seq_length)
    with tempfile.TemporaryDirectory() as scratch:  # --save is not made yet
        train_set = build_alone(replace(data_options(options), cache=Path(scratch), shared=False), counts)[0]
        check_answers(folder, counts[0], vocab_size, train_set)


def _shown(value: Any) -> str:
    """A setting from a file, for a message."""
    return shorten(value).strip("'")


def _check_adapter(options: RecoverOptions) -> None:
    if options.lora_r is None:
        return
    target_roles(options.lora_targets)


def check_tokenizer(prefixes: list[str], model: Opened) -> None:
    """Refuse pairs that say that another tokenizer made them than the one the model keeps."""
    said = {prefix: recorded_tokenizer(prefix) for prefix in prefixes}
    if model.folder is None or not any(said.values()):
        return
    try:
        own = tokenizer_digest(load_tokenizer(model.folder))
    except InputError:  # it keeps a configuration alone
        return
    for prefix, made in said.items():
        if made and made["digest"] != own:
            raise InputError(
                f"{prefix}.bin was made with a tokenizer that is not the model's",
                got=f"{made['name']} of {made['vocab_size']} tokens",
                do=f"make it again with this model's: megatron-prune preprocess --tokenizer {model.path}; or, where the model's "
                "vocabulary was trimmed, renumber it: megatron-prune vocab remap",
            )


def _check_run(options: RecoverOptions, model: Opened) -> None:
    """Refuse a directory that holds something else than the beginning of this run, or a disk without room for it."""
    save = Path(options.save)
    begun = (save / RUN_FILE).is_file()
    if options.overwrite or not begun and not is_blank(save):
        read = (options.teacher, options.teacher_logits)
        check_output(save, RUN, overwrite=options.overwrite, source=Path(options.load), inputs=read)
    elif begun:
        staging.check_free(save)
        before = read_json(save / RUN_FILE, RunFile, error=InputError, do="pass --overwrite to begin anew").settings
        before = {"answers_only": False, **before}
        problems = [
            f"{flag(name)} {value}, begun with {_shown(before.get(name))}"
            for name, value in run_settings(options, model).items()
            if before.get(name) != value
        ]
        raise_all(
            InputError,
            f"{save} holds a run that was begun with other settings",
            problems,
            do="go on with those; or name another --save, and to start from a checkpoint of it --load it",
        )
        read_history(save / HISTORY)
    staging.check_room(save, checkpoint_bytes(options, model))


def is_blank(save: Path) -> bool:
    """Whether a directory is that of a run that was killed while it began."""
    return save.is_dir() and not save.is_symlink() and set(os.listdir(save)) == {f".{RUN_FILE}.partial"}
