"""The unpruned model's most probable tokens on the training data of a recovery, kept for a distillation without it."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path
from typing import Any

import torch

from megatron_prune.config import check_limits
from megatron_prune.errors import InputError, PruneError
from megatron_prune.files import staging
from megatron_prune.opening.opened import open_megatron
from megatron_prune.opening.source import PARAM_DTYPES
from megatron_prune.recovery.flags import SEPARATE_DATA, SHARED, filled
from megatron_prune.runtime.layout import run_layout
from megatron_prune.runtime.reporting import log, progress_bar
from megatron_prune.runtime.world import World
from megatron_prune.text.sources import check_seed
from megatron_prune.verbs.teach import TeachOptions
from megatron_prune.writing.overwrite import TEACHER, check_output


def teach(options: TeachOptions, world: World) -> None:
    """Run the step; every process takes part. A run that was stopped goes on where it was.

    Raises:
        InputError: on arguments, data, a checkpoint or a layout that do not fit; nothing is written.
    """
    check_limits(options)
    save = Path(options.save)
    check_output(save, TEACHER, overwrite=options.overwrite, source=Path(options.load))
    model = open_megatron(options.load, world, options)
    config = model.config
    layout = run_layout(model.layout, world, options.tensor_model_parallel_size, options.pipeline_model_parallel_size)
    layout.check(config)
    length = options.seq_length or min(4096, config.max_position_embeddings)
    if not 2 <= length <= config.max_position_embeddings:
        raise InputError("--seq-length", got=length, needed=f"2 to the model's {config.max_position_embeddings}")
    if options.top_k > config.vocab_size:
        raise InputError("--top-k", got=options.top_k, needed=f"at most the vocabulary's {config.vocab_size}")
    check_seed(options.seed)
    options = dataclasses.replace(filled(options, SEPARATE_DATA), seq_length=length)

    from megatron_prune.recovery.check import check_tokenizer
    from megatron_prune.recovery.data import DataOptions, build_datasets, check_data

    data = DataOptions(
        **{item.name: getattr(options, item.name) for item in dataclasses.fields(DataOptions) if item.name in SHARED},
        cache=staging.work_path(save) / "data_cache",
    )
    error = None
    if world.is_main:
        try:
            check_tokenizer(list(check_data(data, config.vocab_size)), model)
            staging.check_room(save, options.train_iters * options.global_batch_size * length * (6 * options.top_k + 4))
        except InputError as found:
            error = found
    world.agree(error)
    description = describe(options, model.recorded_identity, config.vocab_size)
    with staging.work(save, json.dumps(description), main=world.is_main, agree=world.agree) as folder:
        from megatron_prune.runtime.model import build_model, stop_parallel

        running = build_model(model.tensors, layout, world, dtype=PARAM_DTYPES[options.dtype], seq_length=length)
        samples, held_out = options.train_iters * options.global_batch_size, options.eval_iters * options.global_batch_size
        train_set = build_datasets(data, (samples, held_out, held_out), world)[0]
        _write_parts(options, running, train_set, samples, folder, world)
        stop_parallel()
        world.barrier()

        def finish() -> None:
            from megatron_prune.recovery.stored_logits import DESCRIPTION

            staging.write_text(folder / DESCRIPTION, json.dumps(description, indent=2) + "\n")
            shutil.rmtree(folder / "data_cache")
            staging.finish_work(folder, save)

        world.on_main(finish)
    if world.is_main:
        log.info("%d samples of %d tokens, %d of each distribution: %s", samples, length, options.top_k, save)


def describe(options: TeachOptions, content_id: str | None, vocab_size: int) -> dict[str, Any]:
    """What ``teacher.json`` says."""
    shared = json.loads(json.dumps({name: getattr(options, name) for name in SHARED}))
    return {"teacher": content_id, "vocab_size": vocab_size, "top_k": options.top_k, "dtype": options.dtype, "settings": shared}


def _write_parts(options: TeachOptions, running: Any, train_set: Any, samples: int, folder: Path, world: World) -> None:
    """The files that fall to this data-parallel copy and are not there yet."""
    from megatron.core import parallel_state

    from megatron_prune.recovery.stored_logits import PART, part_path, top_k, write_part
    from megatron_prune.runtime.forward import forward

    copies, copy = parallel_state.get_data_parallel_world_size(), parallel_state.get_data_parallel_rank()
    mine = [part for part in range(-(-samples // PART)) if part % copies == copy]
    writes = parallel_state.get_tensor_model_parallel_rank() == 0
    collect = lambda logits, tokens: top_k(logits, options.top_k, options.distill_temperature)
    done = world.all_gather([part for part in mine if part_path(folder, part).is_file()])  # the same for all of a copy
    finished = {part for parts in done for part in parts}
    with progress_bar("teaching", len(mine) * PART * options.seq_length, shown=world.is_main, unit="tokens") as advance:
        for part in mine:
            numbers = range(part * PART, min((part + 1) * PART, samples))
            if part not in finished:
                tokens = torch.stack([train_set[number % len(train_set)]["tokens"] for number in numbers])
                whole = -(-len(tokens) // options.micro_batch_size) * options.micro_batch_size
                batches = list(tokens[torch.arange(whole).clamp(max=len(tokens) - 1)].split(options.micro_batch_size))
                answers = forward(running, batches, collect)
                if answers and writes:
                    kept = (torch.cat(each)[: len(tokens)] for each in zip(*answers))
                    try:
                        write_part(part_path(folder, part), *kept, tokens)
                    except OSError as error:
                        raise PruneError(f"{part_path(folder, part)} could not be written: {error}; those before stay") from None
            advance(PART * options.seq_length)
