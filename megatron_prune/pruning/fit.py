"""Re-fitting a planned cut on text: from checkpoint, plan and tokens to the tensors of the pruned model."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import torch

from megatron_prune.checkpoint.role_store import RoleStore
from megatron_prune.checkpoint.tensor_map import TensorMap
from megatron_prune.importance.statistics import Statistics
from megatron_prune.importance.text_loss import mean_loss
from megatron_prune.importance.walk import Walk
from megatron_prune.opening.source import PARAM_DTYPES, Source
from megatron_prune.planning.plan import Plan
from megatron_prune.pruning.measure import Subject
from megatron_prune.pruning.options import FitOptions
from megatron_prune.pruning.stream import stream_basis
from megatron_prune.runtime.reporting import log, progress_bar
from megatron_prune.surgery.basis import (
    Basis,
)
from megatron_prune.surgery.block_fit import Fit
from megatron_prune.surgery.reconstruct import fitted_and_held_out
from megatron_prune.surgery.refit import Refit
from megatron_prune.text.tokens import Calibration


def fit_of(options: FitOptions) -> Fit:
    """The options as the engine's."""
    return Fit(
        sequential=bool(options.sequential), writers=options.ridge, readers=options.reader_ridge, passes=options.reconstruct
    )


def best_fit(
    options: FitOptions,
    plans: list[Plan],
    subject: Subject,
    calibration: Calibration,
    statistics: Statistics | None,
    folder: Path,
) -> tuple[Plan, Refitted]:
    """The plan, of several, whose re-fitted model loses least on the samples that joint fits hold out, and that model.

    Args:
        folder: where finished layers are kept.
    """
    found, world = [], subject.world
    for number, plan in enumerate(plans):
        fit, basis = fit_of(options), stream_basis(plan, subject, statistics)
        parts = folder / ("refit" if len(plans) == 1 else f"refit_{number}")
        given = (plan, basis, subject, calibration, PARAM_DTYPES[options.dtype])
        best = refitted(fit, parts, *given)
        if options.sequential is None and best.lost > SEVERE:
            if world.is_main:
                log.info("%.2f nats a token lost: fitting once more, each block to mend what those before it left", best.lost)
            mending = dataclasses.replace(fit, sequential=True)
            other = refitted(mending, parts.with_name(f"{parts.name}_mending"), *given)
            if world.is_main:
                log.info("%.2f nats lost so; the better one stays", other.lost)
            if other.lost < best.lost:
                best, fit = other, mending
        if len(plans) > 1 and world.is_main:
            log.info("%s: %.3f nats a token lost on held-out text", plan.summary(), best.lost)
        made_by = {**plan.made_by, "refit": dataclasses.asdict(fit)}
        found.append((best.lost, number, dataclasses.replace(plan, made_by=made_by), best))
    _, _, plan, best = min(found, key=lambda one: one[:2])
    return plan, best


SEVERE = 0.5
"""Nats a token above the dense model's loss from which on mending may be better (``docs/quality.md``)."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Losses:
    """Mean next-token cross-entropies of the dense and the pruned model on the same held-out samples, in nats a token."""

    dense: float
    pruned: float


@dataclasses.dataclass(frozen=True, kw_only=True)
class Refitted:
    """A re-fitted model.

    Attributes:
        source: its tensors, float32.
        losses: on the samples that joint fits hold out.
    """

    source: Source
    losses: Losses

    @property
    def lost(self) -> float:
        """What its loss is above the dense model's."""
        return self.losses.pruned - self.losses.dense


def refitted(
    fit: Fit,
    parts: Path,
    plan: Plan,
    basis: Basis,
    subject: Subject,
    calibration: Calibration,
    dtype: torch.dtype,
) -> Refitted:
    """Re-fit into the directory ``parts``, going on from the layers that are there; every process takes part.

    Args:
        dtype: what to compute in.
    """
    world = subject.world
    world.on_main(lambda: parts.mkdir(exist_ok=True))
    store = RoleStore(parts, plan.new_config(subject.config))
    stage = subject.engine.stage(subject.config, store.config, dtype=dtype, seq_length=calibration.tokens.shape[1])
    engine = Refit(subject.tensors, plan, basis, calibration, stage, store, world, fit, dtype=dtype)
    with progress_bar("re-fitting", engine.work(), shown=world.is_main, unit="tokens × layers") as advance:
        engine.run(advance)
    losses = Losses(dense=engine.dense_loss(held_out=True), pruned=engine.loss(held_out=True))
    stage.close()
    return Refitted(source=Source(tensors=store.tensors()), losses=losses)


def losses_after(tensors: TensorMap, subject: Subject, calibration: Calibration, dtype: torch.dtype) -> Losses:
    """The losses of a pruned model that was not fitted, and of the dense one; every process takes part.

    Args:
        tensors: of the pruned model.
        dtype: what to compute in.
    """
    stage = subject.engine.stage(subject.config, tensors.config, dtype=dtype, seq_length=calibration.tokens.shape[1])
    among, found = fitted_and_held_out(len(calibration.tokens))[1], []
    for each in (subject.tensors, tensors):
        walk = Walk(each, calibration, stage, subject.world, dtype=dtype, among=among)
        walk.to_the_end()
        found.append(mean_loss(walk, each, among))
    stage.close()
    return Losses(dense=found[0], pruned=found[1])
