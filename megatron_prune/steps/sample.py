"""Text that a model makes itself, kept as a file: calibration data for a model whose text nobody has."""

from __future__ import annotations

from pathlib import Path

from megatron_prune.errors import InputError
from megatron_prune.files import staging
from megatron_prune.opening.opened import open_megatron
from megatron_prune.pruning.engines.megatron import MegatronEngine
from megatron_prune.pruning.measure import CalibrationOptions, Subject, own_samples
from megatron_prune.runtime.layout import run_layout
from megatron_prune.runtime.reporting import log
from megatron_prune.runtime.world import World
from megatron_prune.text.artifact import save_samples
from megatron_prune.text.sources import check_amount, check_seed
from megatron_prune.verbs.sample import SampleOptions


def sample(options: SampleOptions, world: World) -> None:
    """Run the step; every process takes part.

    Raises:
        InputError: on a checkpoint, sizes or a layout that do not fit.
    """
    if options.seq_length < 2:
        raise InputError("--seq-length", got=options.seq_length, needed="at least 2: the first token is never predicted")
    check_amount(options.nsamples, options.seq_length)
    check_seed(options.seed)
    if not options.save.endswith(".safetensors"):
        raise InputError("--save", got=options.save, needed="a file name that ends in .safetensors")
    staging.check_file(Path(options.save))
    model = open_megatron(options.load, world, options)
    layout = run_layout(model.layout, world, options.tensor_model_parallel_size, options.pipeline_model_parallel_size)
    layout.check(model.config)
    if options.seq_length > model.config.max_position_embeddings:
        raise InputError(
            "--seq-length", got=options.seq_length, needed=f"at most the model's {model.config.max_position_embeddings}"
        )
    subject = Subject(model=model, engine=MegatronEngine(layout, world), tokenizer=model.tokenizer)
    shared = ("nsamples", "seq_length", "seed", "dtype")
    wanted = CalibrationOptions(**{name: getattr(options, name) for name in shared})
    tokens = own_samples(wanted, subject, options.nsamples)
    facts = {name: getattr(options, name) for name in shared} | {"bos": model.bos, "content_id": model.identity}
    world.on_main(lambda: save_samples(Path(options.save), tokens, facts))
    if world.is_main:
        log.info("%d samples of %d tokens: %s", *tokens.shape, options.save)
