"""What a pruning says before it starts: the cut, what is read, the steps; then, of each, how long it will take."""

from __future__ import annotations

import contextlib
import dataclasses
from typing import Iterator

from megatron_prune.arch.model import ModelConfig
from megatron_prune.opening.source import PARAM_DTYPES
from megatron_prune.planning.needs import STEPS, Setup
from megatron_prune.planning.words import cut_in_words
from megatron_prune.pruning.asked import sample_length
from megatron_prune.pruning.forecast import Forecast
from megatron_prune.pruning.job import Job
from megatron_prune.pruning.passes import PASSES, Reading, passes_of, sites_of
from megatron_prune.runtime.reporting import log, watched
from megatron_prune.text.data_specs import parse_data


@contextlib.contextmanager
def announced(job: Job, *, checks: bool = True) -> Iterator[None]:
    """Say what a pruning will do, and, while it does it, how long that takes; the first process speaks for all.

    Args:
        checks: whether what was written is checked.
    """
    if not job.subject.world.is_main:
        yield
        return
    shape, passes, last = (
        assumed_shape(job),
        passes_of(job.request, job.subject.config, _reading(job)),
        ["checking what was written"] if checks else [],
    )
    log.info("to be cut: %s", cut_of(job, shape))
    log.info("text: %s", text_of(job))
    log.info("steps: %s", ", ".join([*(PASSES[label] for label in passes), "cutting and writing", *last]))
    setup, counted = setup_of(job, shape), {step.name: step.work for step in STEPS}
    planned = {label: counted[PASSES[label]](setup).operations for label in passes}
    with watched(Forecast(planned, job.subject.config.num_layers)):
        yield


def assumed_shape(job: Job) -> ModelConfig:
    """The shape that is asked for; within a budget the largest."""
    request, config = job.request, job.subject.config
    if request.plan is not None:
        return request.plan.new_config(config)
    if request.target is not None:
        return request.target.config
    return request.shapes[0] if request.shapes else config


def cut_of(job: Job, shape: ModelConfig) -> str:
    """The cut in words."""
    request, config, parts = job.request, job.subject.config, []
    if request.vocab_plan is not None:
        shape = dataclasses.replace(shape, vocab_size=len(request.vocab_plan.vocab))
    if request.bounds is not None:
        limit = request.bounds.budget.describe(request.bounds.budget.limit(request.bounds.config))
        shapes = f", one of {len(request.shapes)} shapes by the scores" if len(request.shapes) > 1 else ""
        parts.append(f"to at most {limit}{shapes}")
    if shape != config:
        words = cut_in_words(config, shape)
        parts.append(f"the largest: {words}" if request.bounds is not None and len(request.shapes) > 1 else words)
    return "; ".join(parts) or "nothing of the shape"


def text_of(job: Job) -> str:
    """What is read."""
    if not job.measured:
        return "none is read, nothing is measured"
    if job.kept_scores and job.options.data is None:
        return f"that of the scores in {job.kept_scores}"
    specs = parse_data(job.options.data)
    names = " and ".join(f"{spec.name} ({spec.weight:.0%})" for spec in specs)
    return f"{names}: {job.options.nsamples} samples each of {sample_length(job.options, job.subject.config)} tokens"


def _reading(job: Job) -> Reading:
    """What is read and measured."""
    return Reading(
        text=job.measured,
        data=job.options.data,
        scores=job.kept_scores is not None,
        costs=job.measures_costs,
        refit=job.fit is not None,
    )


def setup_of(job: Job, shape: ModelConfig) -> Setup:
    """How the passes run, as ``estimate`` asks."""
    options, layout, world = job.options, job.subject.layout, job.subject.world
    return Setup(
        config=job.subject.config,
        target=shape,
        layout=layout,
        data_parallel=max(1, world.size // (layout.tensor * layout.pipeline)),
        samples=options.nsamples * len(parse_data(options.data)),
        sample_length=sample_length(options, job.subject.config),
        width=PARAM_DTYPES[options.dtype].itemsize,
        passes=job.fit.reconstruct if job.fit else 0,
        sites=sites_of(job.request, job.subject.config, _reading(job)),
    )
