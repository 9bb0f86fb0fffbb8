"""Counts → which tokens stay: a report and a plan, nothing cut."""

from __future__ import annotations

from pathlib import Path

from megatron_prune.errors import InputError
from megatron_prune.files import staging
from megatron_prune.opening.foreign import told
from megatron_prune.opening.opened import open_with_vocabulary
from megatron_prune.runtime.reporting import log
from megatron_prune.runtime.world import World
from megatron_prune.verbs.vocab_select import VocabSelectOptions
from megatron_prune.vocabulary.choice import choose, files_of, plan_of, show
from megatron_prune.vocabulary.folder import vocabulary_of
from megatron_prune.vocabulary.request import check_select


def vocab_select(options: VocabSelectOptions, world: World) -> None:
    """Run the step on one process.

    Raises:
        InputError: if the model, the counts or the request do not do; nothing is written.
    """
    if world.size > 1:
        raise InputError("vocab select is started as one process", got=f"{world.size}")
    check_select(options)
    model = open_with_vocabulary(options.load, world, tokenizer=options.tokenizer, beside=told(options))
    vocabulary = vocabulary_of(model)
    model.say_notes()
    if options.save_plan and model.config is None:
        raise InputError("--save-plan", got=f"a tokenizer alone, {model.path}", needed="a model, whose plan it is")
    chosen = choose(options, model, vocabulary)
    show(chosen)
    files = files_of(chosen, options)
    if options.save_plan:
        files[Path(options.save_plan)] = plan_of(chosen, model.config).dumps().encode()
    if files:
        staging.write_files(files)
    if options.save_plan:
        log.info("plan: %s", options.save_plan)
