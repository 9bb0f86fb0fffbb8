"""Score, plan and cut a Megatron checkpoint under TP × PP.

The arguments are those of LLama-Pruner's ``prune_gpt.py`` (S4), and Megatron's own.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from megatron_prune.checkpoint import megatron
from megatron_prune.checkpoint.megatron_args import TRANSFORMER_IMPLS
from megatron_prune.config import Parser, add_options, option
from megatron_prune.families.choice import choose_family
from megatron_prune.files import staging
from megatron_prune.opening.foreign import ForeignOptions
from megatron_prune.opening.opened import open_megatron
from megatron_prune.opening.side_files import say_links
from megatron_prune.planning.target import PRUNE_TYPES
from megatron_prune.pruning.engines.megatron import MegatronEngine
from megatron_prune.pruning.measure import Subject
from megatron_prune.pruning.options import PruningOptions
from megatron_prune.pruning.procedure import prune_model
from megatron_prune.runtime.layout import run_layout
from megatron_prune.runtime.megatron_flags import add_megatron_flags, check_megatron_flags, megatron_flags
from megatron_prune.runtime.world import World
from megatron_prune.writing.cut import Form
from megatron_prune.writing.overwrite import MEGATRON, check_output


@dataclass(frozen=True, kw_only=True)
class PruneOptions(PruningOptions, ForeignOptions):
    """Prune a Megatron checkpoint to a smaller shape, by scores or by a plan, and re-fit what stays."""

    load: str = option("Megatron checkpoint: its root, or an iteration directory")
    save: str = option("pruned Megatron checkpoint to write")
    prune_type: str = option("which units each tensor-parallel rank keeps", "balance", choices=PRUNE_TYPES)
    tokenizer: str | None = option("Hugging Face directory of the tokenizer (default: kept in the checkpoint)", None)
    tensor_model_parallel_size: int | None = option("tensor-parallel ranks (default: those of the checkpoint)", None)
    pipeline_model_parallel_size: int | None = option("pipeline stages (default: those of the checkpoint)", None)
    ckpt_format: str | None = option("layout of the result (default: that of the source)", None, choices=megatron.FORMATS)
    transformer_impl: str = option(
        "whose modules Megatron-LM is to load it into; torch_dist suits both", TRANSFORMER_IMPLS[0], choices=TRANSFORMER_IMPLS
    )
    target_family: str | None = option("Hugging Face family the result will be exported as", None)
    megatron: dict[str, Any] = field(default_factory=dict)


def parse(argv: list[str], prog: str) -> PruneOptions:
    """Read the command line; Megatron's own model flags end in ``PruneOptions.megatron``."""
    parser = Parser(prog=prog, description=PruneOptions.__doc__)
    shown = [item for item in dataclasses.fields(PruneOptions) if item.name != "megatron"]
    add_options(parser, PruneOptions, shown)
    add_megatron_flags(parser)
    namespace = parser.parse_args(argv)
    return PruneOptions(**{item.name: getattr(namespace, item.name) for item in shown}, megatron=megatron_flags(namespace))


def prune(options: PruneOptions, world: World) -> None:
    """Run the step; every process takes part.

    Raises:
        InputError: on a request, layout, plan or checkpoint that does not fit; nothing is written.
    """
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
