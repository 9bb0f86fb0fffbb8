"""Choose what stays, and write it down: the plan that ``prune`` would fit and cut by."""

from __future__ import annotations

from pathlib import Path

from megatron_prune.config import flag
from megatron_prune.errors import InputError
from megatron_prune.families.choice import choose_family
from megatron_prune.files import staging
from megatron_prune.opening.opened import open_to_run
from megatron_prune.planning.plan import Plan
from megatron_prune.pruning.asked import check_asked
from megatron_prune.pruning.engines.choice import engine_of
from megatron_prune.pruning.measure import Subject
from megatron_prune.pruning.procedure import planned
from megatron_prune.runtime.reporting import log
from megatron_prune.runtime.world import World
from megatron_prune.verbs.plan import PlanOptions

FITS = ("sequential", "ridge", "reader_ridge")
"""Options of the fit that choose nothing."""


def plan(options: PlanOptions, world: World) -> Plan:
    """Run the step; every process takes part.

    Raises:
        InputError: on a request, scores or a model that do not fit; nothing is written.
    """
    check_asked(options)
    save = Path(options.save)
    staging.check_file(save)
    if options.plan and not options.uniform:
        raise InputError(
            f"--plan {options.plan} is a plan already", do="prune by it, or turn it into one whose layers are alike: --uniform"
        )
    if idle := [flag(name) for name in FITS if getattr(options, name) is not None]:
        raise InputError(f"{', '.join(idle)}: nothing is fitted", do="leave it out")
    model = open_to_run(options.load, world, options, tokenizer=options.tokenizer)
    engine = engine_of(model, options.tensor_model_parallel_size, options.pipeline_model_parallel_size)
    family = choose_family(model.family, options.target_family, model.config)
    subject = Subject(model=model, engine=engine, tokenizer=model.tokenizer)
    found = planned(options, subject, family, save, prune_type=options.prune_type)
    world.on_main(lambda: staging.write_files({save: found.dumps().encode()}))
    if world.is_main:
        log.info("%s: %s", save, found.summary())
    return found
