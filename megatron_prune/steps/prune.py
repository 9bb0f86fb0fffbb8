"""Score, plan and cut a Megatron checkpoint under TP × PP.

The arguments are those of LLama-Pruner's ``prune_gpt.py`` (S4), and Megatron's own.
"""

from __future__ import annotations

from pathlib import Path

from megatron_prune.families.choice import choose_family
from megatron_prune.files import staging
from megatron_prune.opening.opened import open_megatron
from megatron_prune.opening.side_files import say_links
from megatron_prune.pruning.asked import check_asked
from megatron_prune.pruning.engines.megatron import MegatronEngine
from megatron_prune.pruning.measure import Subject
from megatron_prune.pruning.procedure import prune_model
from megatron_prune.runtime.layout import run_layout
from megatron_prune.runtime.megatron_flags import check_megatron_flags
from megatron_prune.runtime.world import World
from megatron_prune.verbs.prune import PruneOptions
from megatron_prune.writing.cut import Form
from megatron_prune.writing.overwrite import MEGATRON, check_output


def prune(options: PruneOptions, world: World) -> None:
    """Run the step; every process takes part.

    Raises:
        InputError: on a request, layout, plan or checkpoint that does not fit; nothing is written.
    """
    check_asked(options)
    save = Path(options.save)
    read = (options.scores, options.tokenizer)
    check_output(save, MEGATRON, overwrite=options.overwrite, source=Path(options.load), inputs=read)
    if options.save_plan:
        staging.check_file(Path(options.save_plan), beside=save)
    model = open_megatron(options.load, world, options, tokenizer=options.tokenizer, flags=options.megatron)
    check_megatron_flags(options.megatron, model.config)
    say_links(model.path, world)
    layout = run_layout(model.layout, world, options.tensor_model_parallel_size, options.pipeline_model_parallel_size)
    family = choose_family(model.family, options.target_family, model.config)
    subject = Subject(model=model, engine=MegatronEngine(layout, world), tokenizer=model.tokenizer)
    form = Form(ckpt_format=options.ckpt_format, transformer_impl=options.transformer_impl)
    prune_model(options, subject, family, form, save, prune_type=options.prune_type)
