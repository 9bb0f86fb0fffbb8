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
from megatron_prune.opening.foreign import ForeignOptions, open_megatron
from megatron_prune.opening.side_files import say_links
from megatron_prune.opening.source import Source, commonest, model_id, run
from megatron_prune.planning.target import PRUNE_TYPES
from megatron_prune.pruning.engines.megatron import megatron_subject
from megatron_prune.pruning.fit import FitOptions, held_metrics, pruned_source, wants_text
from megatron_prune.pruning.request import TargetOptions, read_request
from megatron_prune.pruning.tokenizer import kept_vocabulary
from megatron_prune.runtime.layout import run_layout
from megatron_prune.runtime.megatron_flags import add_megatron_flags, check_megatron_flags, megatron_flags
from megatron_prune.runtime.reporting import log
from megatron_prune.runtime.world import World
from megatron_prune.writing.check import CheckOptions
from megatron_prune.writing.cut import write_megatron_cut
from megatron_prune.writing.overwrite import MEGATRON, check_output


@dataclass(frozen=True, kw_only=True)
class PruneOptions(TargetOptions, FitOptions, ForeignOptions, CheckOptions):
    """Prune a Megatron checkpoint to a smaller shape, by scores or by a plan, and re-fit what stays."""

    load: str = option("Megatron checkpoint: its root, or an iteration directory")
    save: str = option("pruned Megatron checkpoint to write")
    prune_type: str = option("which units each tensor-parallel rank keeps", "balance", choices=PRUNE_TYPES)
    scores: str | None = option("use these scores (of megatron-prune score) and their text", None)
    save_plan: str | None = option("also write the plan here", None)
    tokenizer: str | None = option("Hugging Face directory of the tokenizer (default: kept in the checkpoint)", None)
    tensor_model_parallel_size: int | None = option("tensor-parallel ranks (default: those of the checkpoint)", None)
    pipeline_model_parallel_size: int | None = option("pipeline stages (default: those of the checkpoint)", None)
    ckpt_format: str | None = option("layout of the result (default: that of the source)", None, choices=megatron.FORMATS)
    transformer_impl: str = option(
        "whose modules Megatron-LM is to load it into; torch_dist suits both", TRANSFORMER_IMPLS[0], choices=TRANSFORMER_IMPLS
    )
    target_family: str | None = option("Hugging Face family the result will be exported as", None)
    overwrite: bool = option("replace an existing output directory", False)
    strict: bool = option("refuse weights that hold NaN or infinity instead of warning", False)
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
    checkpoint = open_megatron(options.load, options, world, options.megatron)
    check_megatron_flags(options.megatron, checkpoint.config)
    say_links(checkpoint.path, world)
    layout = run_layout(checkpoint.layout, world, options.tensor_model_parallel_size, options.pipeline_model_parallel_size)
    family = choose_family(checkpoint.manifest.family, options.target_family)
    request = read_request(
        options,
        checkpoint.config,
        layout,
        family,
        lambda: model_id(checkpoint, world),
        prune_type=options.prune_type,
        has_text=wants_text(options),
        held=held_metrics(options),
        refit=options.refit is not False,
        dtype_bytes=commonest(Source(tensors=checkpoint.tensors).dtypes(checkpoint.config, None)).itemsize,
    )
    trimmed = kept_vocabulary(options, request, checkpoint.config, options.tokenizer, checkpoint.hf_folder)
    if options.strict and wants_text(options):  # before long work, not while its result is written
        run(world, Source(tensors=checkpoint.tensors), None, label="checking", strict=True)
    subject = megatron_subject(checkpoint, layout, options.tokenizer, world)
    made_by = {"prune_type": options.prune_type, "tensor_parallel": layout.tensor, "pipeline_parallel": layout.pipeline}
    with pruned_source(options, request, subject, made_by, save, world) as (plan, source):
        write_megatron_cut(
            save,
            checkpoint,
            layout,
            family,
            plan,
            source,
            world,
            trimmed=trimmed,
            ckpt_format=options.ckpt_format,
            transformer_impl=options.transformer_impl,
            beside={Path(options.save_plan): plan.dumps().encode()} if options.save_plan else {},
            overwrite=options.overwrite,
            strict=options.strict,
            check=not options.no_check,
        )
    if world.is_main:
        log.info("pruned to %s: %s", save, plan.summary())
