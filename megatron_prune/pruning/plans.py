"""Request and scores → the plan, or the plans to be compared."""

from __future__ import annotations

from itertools import islice
from typing import Any, Iterator

from megatron_prune.arch.model import ModelConfig
from megatron_prune.axes.axis import AXES
from megatron_prune.planning.allocators.allocator import Depth
from megatron_prune.planning.costs import Costs
from megatron_prune.planning.loss_estimate import loss_estimate
from megatron_prune.planning.loss_weights import rank_candidates
from megatron_prune.planning.make import make_plan
from megatron_prune.planning.plan import Plan
from megatron_prune.planning.selection import Scores, keep_layers
from megatron_prune.planning.target import Target, needed_scores
from megatron_prune.pruning.measure import Subject
from megatron_prune.pruning.request import Request
from megatron_prune.pruning.scored import Scored
from megatron_prune.pruning.stream import TOO_VARIED, rotates_well
from megatron_prune.runtime.reporting import log


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
    subject, plans = scored.subject, []
    for target in [request.target] if request.target else _within_budget(request, scored, costs, count):
        rotate = request.rotate and (request.by_name or rotates_well(target.config, subject, scored.statistics))
        plans.append(
            make_plan(
                subject.config,
                target,
                target_scores(target, request, scored, rotate=rotate),
                prune_type=prune_type,
                ranks=subject.layout.tensor,
                made_by=made_by | (_selects(subject) if request.rotate and not rotate else {}),
                content_id=subject.model.identity,
                rotate=rotate,
            )
        )
    return plans


def _within_budget(request: Request, scored: Scored, costs: Costs | None, count: int) -> list[Target]:
    uniform = best_targets(request, scored, count) if request.shapes else []
    depths = _depths(request, scored) if costs is not None else ()
    targets = request.allocator.targets(request.bounds, costs, uniform, depths)
    if scored.subject.world.is_main and costs is not None and not any(target.by_layer for target in targets):
        log.warning("layers stay alike: no other sizes keep to the budget and the limits, for these ranks and the model's class")
    return targets


def _depths(request: Request, scored: Scored) -> list[Depth]:
    """Of every depth that the shapes with layers alike have, the layers that go, chosen by the scores; none where layers differ."""
    config = scored.subject.config
    depths = sorted({shape.num_layers for shape in request.shapes} - {config.num_layers})
    if not depths:
        return []
    scores = scored.scores(request.metric_of["layer"], [("layer", None)], [config.num_layers - depth for depth in depths])
    loss, found = loss_estimate(config, scores, even=1.0), []
    for depth in depths:
        kept = keep_layers(scores, config.num_layers, depth)
        goes = tuple(layer for layer in range(config.num_layers) if layer not in kept)
        found.append(Depth(goes, loss(config.of_layers(kept))))
    return found


def _selects(subject: Subject) -> dict[str, str]:
    """The record of a model whose stream is not rotated, though that is the default; it is said in the log too."""
    if subject.world.is_main:
        log.info("hidden channels are selected, not rotated: %s, and the head is tied to the embedding", TOO_VARIED)
    return {"hidden_method": f"select: {TOO_VARIED} to rotate with the head tied"}


def target_scores(target: Target, request: Request, scored: Scored, *, rotate: bool) -> Scores:
    """The scores that choose the units of a shape.

    Args:
        rotate: hidden units are rotated, so that none are chosen.
    """
    config, scores = scored.subject.config, {}
    needed = needed_scores(config, target)
    for axis in sorted({axis for axis, _ in needed}):  # the same order on every process: scoring communicates
        if axis == "hidden" and rotate:
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
    """Those whose stream can be rotated to their width, where it is to be."""
    able: dict[tuple[int, bool], bool] = {}
    for target in targets:
        new = target.config
        key = new.hidden_size, new.tie_embeddings
        if request.rotate and key not in able:
            able[key] = rotates_well(new, scored.subject, scored.statistics)
        if not request.rotate or able[key]:
            yield target
