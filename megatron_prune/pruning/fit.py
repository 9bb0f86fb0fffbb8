"""Re-fitting a planned cut on text: from checkpoint, plan and tokens to the tensors of the pruned model."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Iterator

import torch
from torch import Tensor

from megatron_prune.arch.model import ModelConfig
from megatron_prune.arch.tensors import TensorId, tensor_ids
from megatron_prune.checkpoint.role_store import RoleStore
from megatron_prune.config import option
from megatron_prune.errors import InputError
from megatron_prune.files import staging
from megatron_prune.importance.artifact import ScoresManifest, load_calibration_file, load_scores, scores_digest
from megatron_prune.importance.metric import METRICS
from megatron_prune.importance.scoring import score
from megatron_prune.importance.statistics import STREAM, Statistics
from megatron_prune.opening.source import PARAM_DTYPES, Source
from megatron_prune.planning.plan import Plan, load_plan
from megatron_prune.planning.selection import Scores
from megatron_prune.pruning.flags import check_effect
from megatron_prune.pruning.measure import CalibrationOptions, Subject, check_dtype, measure, obtain_calibration, request_key
from megatron_prune.pruning.request import Request, TargetOptions, choose_plans, metrics_of, vocab_alone
from megatron_prune.runtime.reporting import log, progress_bar
from megatron_prune.runtime.world import World
from megatron_prune.surgery.basis import (
    FINAL_SHARE,
    LARGEST_SPREAD,
    Basis,
    denominator_spread,
    massive_channels,
    rotation,
    selection,
    tied_rotation,
    tied_scale,
)
from megatron_prune.surgery.block_fit import Fit
from megatron_prune.surgery.cut import Cut
from megatron_prune.surgery.refit import Refit
from megatron_prune.text.sources import check_seed
from megatron_prune.text.tokens import Calibration


@dataclass(frozen=True, kw_only=True)
class FitOptions(CalibrationOptions):
    """How what stays is re-fitted on the text."""

    refit: bool | None = option("re-fit what stays by least squares (default: where there is text)", None)
    sequential: bool | None = option(
        "fit every block to mend what the pruned ones before it left, or to the dense model's own stream (default: the stream; "
        "where that leaves a model far from the dense one, both ways, and the better one stays)",
        None,
    )
    ridge: float | None = option(
        "how strongly o and down are held to the cut matrices, as a share of the moment's mean diagonal (default: for each "
        "what predicts one half of the samples best from the other)",
        None,
    )
    reader_ridge: float | None = option("the same for q, k, v, gate and up, where hidden units are cut", None)
    reconstruct: int = option(
        "passes over the text in which all matrices of a cut block are fitted together; 0 leaves it at least squares", 4
    )

    def fit(self) -> Fit:
        """The engine's options.

        Raises:
            InputError: if a number is negative or not finite.
        """
        for name in ("ridge", "reader_ridge", "reconstruct"):
            value = getattr(self, name)
            if value is not None and not 0 <= value < math.inf:
                raise InputError(f"--{name}", got=value, needed="at least 0 and finite")
        return Fit(sequential=bool(self.sequential), writers=self.ridge, readers=self.reader_ridge, passes=self.reconstruct)


def wants_text(options: FitOptions) -> bool:
    """Whether a run measures anything: text or scores were named, re-fitting asked for, or a metric needs it."""
    named = options.data is not None or options.scores is not None or bool(options.refit)
    if options.plan or vocab_alone(options):
        return named
    return named or any(METRICS.get(name).needs for name in metrics_of(options, has_text=False).values())


@contextlib.contextmanager
def pruned_source(
    options: FitOptions, request: Request, subject: Subject, made_by: dict[str, object], save: Path, world: World
) -> Iterator[tuple[Plan, Source]]:
    """Measure, plan and re-fit as asked for: the plan, and the pruned model's tensors to be written to ``save``.

    What is measured and fitted is kept beside ``save`` until that is written, so that a stopped run goes on.

    Raises:
        InputError: if scores are of another model, or data does not fit.
    """
    options.fit()
    check_seed(options.seed)
    refit = wants_text(options) and options.refit is not False
    check_effect(options, request, subject.config, text=wants_text(options), refit=refit)
    used = {axis: request.metric_of[axis] for axis in sorted(request.axes(subject.config))}
    made_by = {"metric": options.metric or used, "seed": options.seed, **made_by}
    if options.vocab_plan:
        made_by["vocab"] = load_plan(Path(options.vocab_plan)).made_by.get("vocab", {})
    if not wants_text(options):
        plan = _plans(options, request, subject, made_by, None, None, world)[0]
        yield _cut(plan, request, subject)
        return
    held = Path(options.scores) if options.scores else None
    if held:
        check_scores(held, request, subject)
    else:
        check_dtype(options, request.metrics(subject.config))
    if not refit and request.rotates(subject.config):
        raise InputError("--no-refit with rotated hidden units", do="use --hidden_method select, or re-fit")
    asked = {name: getattr(options, name) for kind in (TargetOptions, FitOptions) for name in kind.__dataclass_fields__}
    read = request.plan.dumps() if request.plan else None
    key = request_key(options, subject, **{**asked, "plan": read, "scores": held and scores_digest(held), "made_by": made_by})
    with staging.work(save, key, main=world.is_main, agree=world.agree) as folder:
        known = load_calibration_file(held, subject.config) if held and options.data is None else None
        calibration = known or obtain_calibration(options, subject, folder, world)
        made_by |= {"calibration": {"digest": calibration.digest, "sources": calibration.provenance}}
        names, moments = ([], frozenset()) if held else (request.metrics(subject.config), request.moments(subject.config))
        moments |= {STREAM} if request.rotates(subject.config) else set()
        passes = names or moments
        statistics = measure(names, moments, options, subject, calibration, folder, world) if passes else None
        plans = _plans(options, request, subject, made_by, held, statistics, world)
        if refit:
            plan, source = _best_fit(options, plans, subject, calibration, statistics, folder, world)
            if request.vocab is not None:  # last: what is fitted speaks the whole vocabulary, as its text does
                plan = plan.with_vocab(request.vocab)
                source = dataclasses.replace(source, transform=Cut(plan, subject.config).tokens)
            yield plan, source
        else:
            yield _cut(plans[0], request, subject)


def _cut(plan: Plan, request: Request, subject: Subject) -> tuple[Plan, Source]:
    """A plan with the tokens that were asked for, and the pruned tensors where nothing is fitted."""
    plan = plan.with_vocab(request.vocab)
    cut = Cut(plan, subject.config)
    return plan, Source(tensors=subject.tensors, origin=cut.origin, transform=cut.transform)


def _best_fit(
    options: FitOptions,
    plans: list[Plan],
    subject: Subject,
    calibration: Calibration,
    statistics: Statistics | None,
    folder: Path,
    world: World,
) -> tuple[Plan, Source]:
    """The plan, of several, whose re-fitted model has the lowest loss on the text, and that model's tensors."""
    found = []
    for number, plan in enumerate(plans):
        fit, basis = options.fit(), stream_basis(plan, subject, statistics)
        parts = folder / ("refit" if len(plans) == 1 else f"refit_{number}")
        given = (plan, basis, subject, calibration, PARAM_DTYPES[options.dtype], world)
        best = refitted(fit, parts, *given, measured=len(plans) > 1)
        if options.sequential is None and best.lost > SEVERE:
            if world.is_main:
                log.info("%.2f nats a token lost: fitting once more, each block to mend what those before it left", best.lost)
            mending = dataclasses.replace(fit, sequential=True)
            other = refitted(mending, parts.with_name(f"{parts.name}_mending"), *given, measured=len(plans) > 1)
            if world.is_main:
                log.info("%.2f nats lost so; the better one stays", other.lost)
            if other.lost < best.lost:
                best, fit = other, mending
        if len(plans) > 1 and world.is_main:
            log.info("%s: perplexity %.3f on the calibration text", plan.summary(), math.exp(min(best.loss, 700.0)))
        made_by = {**plan.made_by, "refit": dataclasses.asdict(fit)}
        found.append((best.loss, number, dataclasses.replace(plan, made_by=made_by), best.source))
    _, _, plan, source = min(found, key=lambda one: one[:2])
    return plan, source


SEVERE = 0.5
"""Nats a token above the dense model's loss from which on mending may be better (``docs/quality.md``)."""


def held_metrics(options: FitOptions) -> list[str] | None:
    """Metrics of the scores that were named.

    Raises:
        InputError: if the directory holds no finished scores.
    """
    return ScoresManifest.load(Path(options.scores)).metrics if options.scores else None


def check_scores(held: Path, request: Request, subject: Subject) -> None:
    """Refuse scores of another model, or without a metric that is needed.

    Raises:
        InputError: saying which.
    """
    manifest = ScoresManifest.load(held)
    manifest.check(subject.config, subject.content_id, held)
    for name in request.metrics(subject.config):
        if METRICS.get(name).needs and name not in manifest.metrics:
            raise InputError(
                f"{held} holds no scores of {name}", got=", ".join(manifest.metrics), do=f"score with --metrics {name}"
            )


def _plans(
    options: FitOptions,
    request: Request,
    subject: Subject,
    made_by: dict[str, object],
    held: Path | None,
    statistics: Statistics | None,
    world: World,
) -> list[Plan]:
    """The plans, from kept scores where there are some, else from what was measured and the weights."""

    def scores_of(name: str, wanted: list[tuple[str, int | None]]) -> Scores:
        metric = METRICS.get(name)
        if held is not None and metric.needs:
            return load_scores(held, name)
        total = sum(subject.tensors.nbytes(tensor) for tensor in tensor_ids(subject.config))
        found = metric(seed=options.seed, statistics=statistics)
        shown = world.is_main and metric.reads_weights
        with progress_bar("scoring", total // (subject.layout.tensor * subject.layout.pipeline), shown=shown) as advance:
            scores = score(found, subject.tensors, subject.layout, wanted, world, advance)
        blocks = request.dropped(subject.config) if metric.block_wise else ()
        return scores | {("block", count): found.block_scores(count) for count in blocks}

    moment = statistics.stream_moment(FINAL_SHARE) if request.shapes and request.rotates(subject.config) else None

    @functools.cache
    def rotates_well(width: int) -> bool:
        return _tied_spread(subject, statistics, moment, width) <= LARGEST_SPREAD

    def possible(shape: ModelConfig) -> bool:
        tied_cut = request.rotate and shape.tie_embeddings and shape.hidden_size != subject.config.hidden_size
        return not tied_cut or rotates_well(shape.hidden_size)

    return choose_plans(
        request,
        subject.config,
        subject.layout,
        subject.content_id,
        scores_of,
        count=options.search,
        possible=possible,
        prune_type=made_by.get("prune_type", "balance"),
        made_by=made_by,
    )


@dataclass(frozen=True, kw_only=True)
class Refitted:
    """A re-fitted model.

    Attributes:
        source: its tensors, float32.
        lost: what its loss is above the dense model's on the samples that joint fits hold out, in nats a token.
        loss: on all of the calibration text; 0 if that was not asked for.
    """

    source: Source
    lost: float
    loss: float


def refitted(
    fit: Fit,
    parts: Path,
    plan: Plan,
    basis: Basis,
    subject: Subject,
    calibration: Calibration,
    dtype: torch.dtype,
    world: World,
    *,
    measured: bool,
) -> Refitted:
    """Re-fit into the directory ``parts``, going on from the layers that are there; every process takes part.

    Args:
        dtype: what to compute in.
        measured: whether the loss on all of the text is wanted.
    """
    world.on_main(lambda: parts.mkdir(exist_ok=True))
    store = RoleStore(parts, plan.new_config(subject.config))
    stage = subject.runner.stage(subject.config, store.config, dtype=dtype, seq_length=calibration.tokens.shape[1])
    engine = Refit(subject.tensors, plan, basis, calibration, stage, store, world, fit, dtype=dtype)
    with progress_bar("re-fitting", engine.work(), shown=world.is_main, unit="tokens × layers") as advance:
        engine.run(advance)
    loss = engine.loss() if measured else 0.0
    lost = engine.loss(held_out=True) - engine.dense_loss(held_out=True)
    stage.close()
    return Refitted(source=Source(tensors=store.tensors()), lost=lost, loss=loss)


def _tied_spread(subject: Subject, statistics: Statistics, moment: Tensor, width: int) -> float:
    """How much a rotation to ``width`` that keeps the head tied disturbs the norms, before any cut."""
    weight = subject.tensors.read_block(TensorId("final_norm"), range(subject.config.hidden_size)).double()
    streams = [statistics.layer(layer).last for layer in (*range(subject.config.num_layers), None)]
    return denominator_spread(tied_scale(weight, massive_channels(moment, weight, width)), streams)


def stream_basis(plan: Plan, subject: Subject, statistics: Statistics | None) -> Basis:
    """The basis of the pruned stream.

    Args:
        statistics: with the stream's second moments, for a plan that rotates it.

    Raises:
        InputError: if a tied head stands in the way of a rotation.
    """
    if plan.hidden is not None:
        return selection(plan.hidden, subject.config.hidden_size)
    if not plan.rotated:
        return Basis()
    moment, width = statistics.stream_moment(FINAL_SHARE), plan.new["hidden_size"]
    if not plan.new_config(subject.config).tie_embeddings:
        return rotation(moment, width)
    weight = subject.tensors.read_block(TensorId("final_norm"), range(subject.config.hidden_size)).double()
    spread = _tied_spread(subject, statistics, moment, width)
    if spread > LARGEST_SPREAD:
        raise InputError(
            "the final norm varies too much for a rotation that keeps the head tied to the embedding",
            got=f"norms disturbed by {spread:.3f} at full width, before any cut",
            needed=f"at most {LARGEST_SPREAD}",
            do="store the head as a matrix of its own with --untie, or cut channels as they are with --hidden_method select",
        )
    return tied_rotation(moment, weight, width)
