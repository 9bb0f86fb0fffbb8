"""Request and scores → the plan, or the plans to be compared."""

from __future__ import annotations

from itertools import islice
from typing import Any, Iterator

from megatron_prune.arch.model import ModelConfig
from megatron_prune.axes.axis import AXES
from megatron_prune.planning.costs import Costs
from megatron_prune.planning.loss_estimate import loss_estimate, rank_candidates
from megatron_prune.planning.make import make_plan
from megatron_prune.planning.plan import Plan
from megatron_prune.planning.selection import Scores, needed_scores
from megatron_prune.planning.target import Target
from megatron_prune.pruning.request import Request
from megatron_prune.pruning.scored import Scored
from megatron_prune.pruning.stream import rotates_well
from megatron_prune.runtime.reporting import log
from megatron_prune.surgery.basis import FINAL_SHARE


def make_plans(
    request: Request, scored: Scored, costs: Costs | None, *, count: int, prune_type: str, made_by: dict[str, Any]
) -> list[Plan]:
    """The plan; within a budget, one for each of the shapes that look best, the best first. Their vocabulary is whole.

    The same on every process; all take part.

    Args:
        costs: of blocks, where the budget is dealt out by them.
        count: of shapes whose layers are alike.
        prune_type: which units each tensor-parallel rank keeps.
        made_by: the plan's record.
    """
    if request.plan is not None:
        return [request.plan]
    subject = scored.subject
    plans = []
    for target in [request.target] if request.target else _within_budget(request, scored, costs, count):
        plans.append(
            make_plan(
                subject.config,
                target,
                target_scores(target, request, scored),
                prune_type=prune_type,
                ranks=subject.layout.tensor,
                made_by=made_by,
                content_id=subject.model.identity,
                rotate=request.rotate,
            )
        )
    return plans


def _within_budget(request: Request, scored: Scored, costs: Costs | None, count: int) -> list[Target]:
    uniform = best_targets(request, scored, count) if request.shapes else []
    targets = request.allocator.targets(request.bounds, costs, uniform)
    if scored.subject.world.is_main and costs is not None and not any(target.by_layer for target in targets):
        log.warning("no sizes by layer that the budget leaves room for can be shared by the ranks and said by the model's class")
    return targets


def target_scores(target: Target, request: Request, scored: Scored) -> Scores:
    """The scores that choose the units of a shape."""
    config, scores = scored.subject.config, {}
    needed = needed_scores(config, target)
    for axis in sorted({axis for axis, _ in needed}):  # the same order on every process: scoring communicates
        if axis == "hidden" and request.rotate:
            continue
        wanted = [place for place in needed if place[0] == axis]
        found = scored.scores(request.metric_of[axis], wanted, request.dropped(config))
        names = ("layer", "block") if axis == "layer" else (axis,)
        scores |= {place: value for place, value in found.items() if place[0] in names}
    return scores


def best_targets(request: Request, scored: Scored, count: int) -> list[Target]:
    """The ``count`` shapes within the budget that look best, of those that can be made; if none can, as if all could."""
    ranked = ranked_targets(request, scored)
    return list(islice(_that_rotate(ranked, request, scored), count)) or ranked[:count]


def ranked_targets(request: Request, scored: Scored) -> list[Target]:
    """The shapes within the budget, those first that the scores expect to lose least."""
    config = scored.subject.config
    scores: Scores = {}
    for axis in sorted(request.axes(config)):
        wanted = [(axis, layer) for layer in (range(config.num_layers) if AXES.get(axis).per_layer else [None])]
        found = scored.scores(request.metric_of[axis], wanted, request.dropped(config))
        scores |= {place: found[place] for place in wanted}
    ranked = rank_candidates(config, list(request.shapes), loss_estimate(config, scores, even=0.5))
    return [Target(config=shape, drop_layers=_whole(shape, config)) for _, shape in ranked]


def _whole(shape: ModelConfig, config: ModelConfig) -> tuple[()] | None:
    """No layers go by name where all stay; else the scores choose them."""
    return () if shape.num_layers == config.num_layers else None


def _that_rotate(targets: list[Target], request: Request, scored: Scored) -> Iterator[Target]:
    """Those whose stream can be rotated to their width, where it has to be under a tied head."""
    subject, statistics, able = scored.subject, scored.statistics, {}
    moment = statistics.stream_moment(FINAL_SHARE) if request.rotates(subject.config) else None
    for target in targets:
        width = target.config.hidden_size
        if request.rotate and target.config.tie_embeddings and width != subject.config.hidden_size:
            if width not in able:
                able[width] = rotates_well(width, subject, statistics, moment)
            if not able[width]:
                continue
        yield target
