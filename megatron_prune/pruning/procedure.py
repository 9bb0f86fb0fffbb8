"""One pruning at work: measure, plan, fit, write. Which engine runs the model makes no difference here."""

from __future__ import annotations

import contextlib
import dataclasses
import math
from pathlib import Path
from typing import Iterator

from megatron_prune.arch.tensors import parameter_count
from megatron_prune.errors import InputError
from megatron_prune.families.family import Family
from megatron_prune.files import staging
from megatron_prune.importance.artifact import load_calibration_file
from megatron_prune.importance.statistics import STREAM, Statistics
from megatron_prune.opening.opened import open_to_run
from megatron_prune.opening.options import ForeignOptions
from megatron_prune.opening.source import PARAM_DTYPES, Source
from megatron_prune.planning.costs import Costs
from megatron_prune.planning.costs_file import load_costs
from megatron_prune.planning.plan import Plan
from megatron_prune.pruning.announcement import announced
from megatron_prune.pruning.costs import measured_costs, needed_moments
from megatron_prune.pruning.fit import Losses, best_fit, losses_after
from megatron_prune.pruning.job import Job, settle
from megatron_prune.pruning.measure import Subject, measure, obtain_calibration
from megatron_prune.pruning.options import ChoosingOptions, PruningOptions
from megatron_prune.pruning.plans import make_plans
from megatron_prune.pruning.scored import Scored
from megatron_prune.pruning.tokens import folded
from megatron_prune.runtime.reporting import log
from megatron_prune.serving.demand import warnings
from megatron_prune.surgery.cut import Cut
from megatron_prune.text.tokens import Calibration
from megatron_prune.writing.cut import Form, write_cut
from megatron_prune.writing.output import Output


def prune_model(options: PruningOptions, subject: Subject, family: Family, form: Form, save: Path, *, prune_type: str) -> None:
    """Prune a model of either kind and write it at ``save``; every process takes part.

    Args:
        family: what the result is written as.

    Raises:
        InputError: on a request, plan, scores or data that do not fit; nothing is written.
    """
    job, model = settle(options, subject, family, prune_type=prune_type), subject.model
    with announced(job, checks=not options.no_check):
        if options.strict and (job.measured or model.recorded_identity is None):
            model.check_values()  # before long work, not while its result is written
        with pruned(job, save) as result:
            plan = result.plan
            beside = {Path(options.save_plan): plan.dumps().encode()} if options.save_plan else {}
            how = {"overwrite": options.overwrite, "strict": options.strict, "check": not options.no_check}
            common = {"layout": subject.layout, "family": family, "trimmed": job.trimmed, "losses": _recorded(result.losses)}
            write_cut(Output(save=save, beside=beside, **how), model, plan, result.source, form, **common)
            losses = result.losses or _losses_after(job, save, result)
    if subject.world.is_main:
        log.info("pruned to %s: %s", save, plan.summary())
        new = plan.new_config(model.config)
        for line in warnings(new, family, model.template, before=model.config) if job.request.bounds else ():
            log.warning("%s", line)
        say_outcome(parameter_count(subject.config), parameter_count(new), losses)


def _recorded(losses: Losses | None) -> dict[str, float] | None:
    """What the recipe says of them: JSON has no word for a loss that is not finite."""
    if losses is None or not (math.isfinite(losses.dense) and math.isfinite(losses.pruned)):
        return None
    return {"before": losses.dense, "after": losses.pruned}


BROKEN = math.log(10.0)
"""Nats a token: a model that lost so much, its perplexity ten times what it was, no longer says what the whole one did."""


def say_outcome(before: int, after: int, losses: Losses | None) -> None:
    """Parameters and held-out losses before and after, and a warning where the loss says that the model is broken."""
    log.info("parameters %s → %s (%+.1f %%)", f"{before:,}", f"{after:,}", 100.0 * (after - before) / before)
    if losses is None:
        log.info("its loss was not measured: no text was read (megatron-prune evaluate does, on any text)")
        return
    lost = losses.pruned - losses.dense
    ratio = f"{math.exp(lost):.3g}" if lost < 700 else "infinity"
    said = (losses.dense, losses.pruned, ratio)
    log.info("loss on held-out samples %.3f → %.3f nats a token: perplexity × %s", *said)
    if not lost < BROKEN:
        log.warning(
            "by its loss the pruned model is broken: cut less, name more text (--data, --nsamples), re-fit it, or train it with "
            "megatron-prune recover"
        )


def _losses_after(job: Job, save: Path, result: Pruned) -> Losses | None:
    """Of a model that was not fitted, where there is text that it can read."""
    if result.calibration is None or job.trimmed is not None:
        return None
    written = open_to_run(str(save), job.subject.world, ForeignOptions())
    return losses_after(written.tensors, job.subject, result.calibration, PARAM_DTYPES[job.options.dtype])


def planned(options: ChoosingOptions, subject: Subject, family: Family, work: Path, *, prune_type: str) -> Plan:
    """The plan that :func:`prune_model` would fit first; nothing is fitted. Every process takes part.

    Args:
        family: what the result would be written as.
        work: directory that what is measured is kept beside, so that a stopped run goes on.

    Raises:
        InputError: on a request, scores or data that do not fit.
    """
    job = settle(options, subject, family, prune_type=prune_type)
    tokens, world = job.request.vocab_plan, subject.world
    if not job.measured:
        return _plans(job, None, None, None)[0].with_tokens_of(tokens)
    with staging.work(work, job.key(), main=world.is_main, agree=world.agree) as folder:
        calibration = _calibration(job, folder)
        return _plans(job, _statistics(job, calibration, folder), calibration, folder)[0].with_tokens_of(tokens)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Pruned:
    """A pruned model that is yet to be written.

    Attributes:
        source: its tensors.
        losses: its and the dense model's, where it was fitted.
        calibration: the text that was read, if any was.
    """

    plan: Plan
    source: Source
    losses: Losses | None = None
    calibration: Calibration | None = None


@contextlib.contextmanager
def pruned(job: Job, save: Path) -> Iterator[Pruned]:
    """The pruned model, to be written to ``save``; every process takes part.

    What is measured and fitted is kept beside ``save`` until that is written, so that a stopped run goes on.

    Raises:
        InputError: if data does not fit, or something that is measured is not finite.
    """
    world, config, tokens = job.subject.world, job.subject.config, job.request.vocab_plan
    if not job.measured:
        yield _cut(_plans(job, None, None, None)[0].with_tokens_of(tokens), job.subject)
        return
    with staging.work(save, job.key(), main=world.is_main, agree=world.agree) as folder:
        calibration = _calibration(job, folder)
        if job.fold:
            plan = job.request.plan.with_tokens_of(tokens)
            plan, source = folded(plan, job.trimmed.id_map, job.subject, calibration, job.options)
            yield Pruned(plan=plan, source=source, calibration=calibration)
            return
        statistics = _statistics(job, calibration, folder)
        plans = _plans(job, statistics, calibration, folder)
        if job.fit is None:
            yield _cut(plans[0].with_tokens_of(tokens), job.subject, calibration)
            return
        plan, fitted = best_fit(job.fit, plans, job.subject, calibration, statistics, folder)
        source = fitted.source
        if tokens is not None:  # last: what is fitted speaks the whole vocabulary, as its text does
            plan = plan.with_tokens_of(tokens)
            source = dataclasses.replace(source, transform=Cut(plan, config).tokens)
        yield Pruned(plan=plan, source=source, losses=fitted.losses, calibration=calibration)


def _calibration(job: Job, folder: Path) -> Calibration:
    """The text: that of the scores, where no other was named.

    Raises:
        InputError: if it does not begin as the model's text must.
    """
    if job.kept_scores and job.options.data is None:
        if known := load_calibration_file(job.kept_scores, job.subject.config):
            leading = job.subject.model.leading
            if leading is not None and (known.tokens[:, 0] != leading).any():
                what = f"{job.kept_scores} was measured on samples that do not begin with the BOS token, which this model needs"
                raise InputError(what, do="score again, or name text with --data")
            return known
    return obtain_calibration(job.options, job.subject, folder)


def _statistics(job: Job, calibration: Calibration, folder: Path) -> Statistics | None:
    """What the plan and its basis need of the text; ``None`` where that is nothing."""
    config, names, moments = job.subject.config, [], frozenset()
    if job.kept_scores is None:
        names = sorted({*job.request.metrics(config), *job.request.fallback_metrics(config)})
        moments = job.request.moments(config)
    if job.request.rotates(config):
        moments |= {STREAM}
    if job.measures_costs:
        moments |= needed_moments(config)
    return measure(names, moments, job.options, job.subject, calibration, folder) if names or moments else None


def _plans(job: Job, statistics: Statistics | None, calibration: Calibration | None, folder: Path | None) -> list[Plan]:
    made_by = job.made_by
    if calibration is not None:
        made_by = {**made_by, "calibration": {"digest": calibration.digest, "sources": calibration.provenance}}
    scored = Scored(subject=job.subject, seed=job.options.seed, kept=job.kept_scores, statistics=statistics)
    costs = _costs(job, scored, calibration, folder) if job.request.probed_axes() else None
    return make_plans(job.request, scored, costs, count=job.search, prune_type=job.prune_type, made_by=made_by)


def _costs(job: Job, scored: Scored, calibration: Calibration, folder: Path) -> Costs:
    """What blocks cost the model: kept beside the scores, or measured."""
    config, metric_of = job.subject.config, job.request.metric_of
    if not job.measures_costs:
        return load_costs(job.kept_scores, config)
    dtype = PARAM_DTYPES[job.options.dtype]
    return measured_costs(job.subject, scored.by_layer(metric_of), metric_of, scored.statistics, calibration, folder, dtype)


def _cut(plan: Plan, subject: Subject, calibration: Calibration | None = None) -> Pruned:
    """What a plan leaves of the tensors as they are."""
    cut = Cut(plan, subject.config)
    source = Source(tensors=subject.tensors, origin=cut.origin, transform=cut.transform)
    return Pruned(plan=plan, source=source, calibration=calibration)
