"""Where a plan comes from: a file, or a metric's scores under a request for a shape or a budget."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING

from megatron_prune.arch.model import ModelConfig
from megatron_prune.arch.sharding import ParallelLayout
from megatron_prune.arch.tensors import parameter_count
from megatron_prune.axes.axis import AXES, layer_axes
from megatron_prune.config import check_limits, flag
from megatron_prune.errors import InputError, PlanError
from megatron_prune.planning.allocators.allocator import ALLOCATORS, Allocator, Bounds
from megatron_prune.planning.budget import read_budget
from megatron_prune.planning.check import check_plan, kept_tokens
from megatron_prune.planning.loss_weights import cut_axes
from megatron_prune.planning.multiples import check_multiples, parse_multiples
from megatron_prune.planning.plan import Plan, load_plan, whole_plan
from megatron_prune.planning.shapes import check_budget, uniform_shapes
from megatron_prune.planning.target import NO_ROTATION, Target, check_kinds, check_target, needed_scores, resolve_target
from megatron_prune.pruning.allocation import check_allocation, read_bounds
from megatron_prune.pruning.asked import by_layer, metrics_of, vocab_alone
from megatron_prune.pruning.metric_facts import check_scores_axis, metric_facts
from megatron_prune.pruning.options import TargetOptions
from megatron_prune.serving.demand import Demand

if TYPE_CHECKING:  # else torch: an estimate reads a request of a configuration alone
    from megatron_prune.opening.opened import Opened


@dataclass(frozen=True, kw_only=True)
class Request:
    """What was asked for, checked against the model before anything is measured.

    Attributes:
        target: the exact shape; ``None`` for a budget or a plan.
        shapes: the shapes that meet the budget and have layers alike, largest first.
        bounds: what shapes within the budget have to keep to; ``None`` without one.
        allocator: how the budget is dealt out to layers.
        plan: the plan that was read, but for its vocabulary.
        vocab_plan: the plan that says which tokens stay; ``None``: all do.
        metric_of: axis → spelling of the metric that scores it.
        rotate: whether cut hidden units are rotated first.
        by_name: whether that was asked for; else what cannot be rotated is selected.
    """

    target: Target | None = None
    shapes: tuple[ModelConfig, ...] = ()
    bounds: Bounds | None = None
    allocator: Allocator = ALLOCATORS.get("uniform")
    plan: Plan | None = None
    vocab_plan: Plan | None = None
    metric_of: dict[str, str]
    rotate: bool
    by_name: bool = False

    def axes(self, config: ModelConfig) -> set[str]:
        """Axes whose scores are needed to choose units of a model of that shape."""
        if self.plan is not None:
            return set()
        if self.bounds is not None:
            return {axis for shape in self.shapes for axis in cut_axes(config, shape)} | self.probed_axes()
        needed = {axis for axis, _ in needed_scores(config, self.target)}
        return needed - {"hidden"} if self.rotate else needed

    def probed_axes(self) -> set[str]:
        """Axes along which the costs of blocks are measured."""
        return set(layer_axes()) if self.allocator.measures_costs else set()

    def rotates(self, config: ModelConfig) -> bool:
        """Whether the plan will (or, within a budget, may) rotate the stream."""
        if self.plan is not None:
            return self.plan.rotated
        shapes = self.shapes if self.target is None else (self.target.config,)
        return self.rotate and any(shape.hidden_size != config.hidden_size for shape in shapes)

    def dropped(self, config: ModelConfig) -> list[int]:
        """How many layers may have to go."""
        shapes = self.shapes or ((self.target.config,) if self.target else ())
        return sorted({config.num_layers - shape.num_layers for shape in shapes} - {0})

    def metrics(self, config: ModelConfig) -> list[str]:
        """Names of the metrics whose scores are needed."""
        return sorted({self.metric_of[axis] for axis in self.axes(config)})

    def fallback(self, config: ModelConfig) -> set[str]:
        """The axis of hidden units, where it will turn out with what is measured whether they are rotated or selected."""
        shapes = self.shapes or ((self.target.config,) if self.target else ())
        tied = any(shape.tie_embeddings and shape.hidden_size != config.hidden_size for shape in shapes)
        scored = "hidden" in metric_facts(self.metric_of["hidden"]).axes
        return {"hidden"} if tied and scored and self.rotate and not self.by_name else set()

    def fallback_metrics(self, config: ModelConfig) -> set[str]:
        """Names of the metrics whose scores are needed then."""
        return {self.metric_of[axis] for axis in self.fallback(config)}

    def moments(self, config: ModelConfig) -> frozenset[str]:
        """Sites whose second moments those metrics read."""
        axes = self.axes(config) | self.fallback(config)
        kinds = ((axis, metric_facts(self.metric_of[axis])) for axis in axes)
        return frozenset(kind.moments[axis] for axis, kind in kinds if axis in kind.moments)


def read_request(
    options: TargetOptions,
    model: Opened,
    layout: ParallelLayout,
    demand: Demand,
    *,
    prune_type: str,
    has_text: bool,
    held: list[str] | None = None,
    refit: bool = True,
) -> Request:
    """Check what was asked for.

    Args:
        model: what is pruned.
        layout: how the run divides it.
        demand: what the result is written as, and where it is to be served.
        has_text: whether there is calibration text.
        held: metrics whose scores were made before.
        refit: whether what stays is re-fitted.

    Raises:
        InputError: if the request or the plan does not fit the model, the layout or the family.
    """
    config = model.config
    layout.check(config)
    check_limits(options)
    by_name = options.hidden_method == "rotate"
    if by_name and not has_text:
        raise InputError("--hidden-method rotate needs text to find the subspace", do="name some with --data, or use select")
    if by_name and config.after_norms:
        raise InputError("--hidden-method rotate", got=NO_ROTATION, do="use select, or leave it out")
    rotate = by_name or (options.hidden_method is None and has_text and refit and not config.after_norms)
    metric_of = metrics_of(options, has_text=has_text, held=held, refit=refit)
    common = {"metric_of": metric_of, "rotate": rotate, "by_name": by_name}
    if options.uniform and not options.plan:
        raise InputError("--uniform without --plan", do="name the plan whose layers differ")
    if options.plan and not options.uniform:
        plan = _read(options, model, layout, demand, prune_type, has_text)
        return Request(plan=plan.with_tokens_of(None), vocab_plan=plan if plan.vocab is not None else None, **common)
    if options.vocab_plan:
        vocab_plan = common["vocab_plan"] = load_plan(Path(options.vocab_plan))
        kept_tokens(vocab_plan, config, options.vocab_plan)
        if vocab_alone(options):
            demand.check(_trimmed(common, config))
            return Request(plan=whole_plan(config, vocab_plan.made_by, model.identity), **common)
    multiples, twin_of = parse_multiples(options.multiple_of) if options.multiple_of else {}, None
    if options.uniform:  # channels one by one, so that the numbers of parameters come as close as they can
        twin_of, multiples = _by_layer_plan(options, model), {"ffn": 1, **multiples}
    budget = read_budget(
        params=str(parameter_count(twin_of)) if twin_of else options.params,
        ratio=options.ratio,
        memory=options.memory,
        seq_length=options.memory_seq_length,
        batch=options.memory_batch,
        dtype_bytes=model.dtype.itemsize,
    )
    sizes = {name: getattr(options, name) for name in (*TargetOptions.SIZES, *TargetOptions.BY_LAYER)}
    if budget is not None:
        budget = dataclasses.replace(budget, vocab_size=len(vocab_plan.vocab) if options.vocab_plan else None)
        bounds = read_bounds(options, _untied(options, config), budget, multiples, layout, demand, prune_type=prune_type)
        allocator, shapes = ALLOCATORS.get(options.allocate), ()
        if allocator.measures_costs:
            check_allocation(bounds, common["metric_of"], has_text=has_text, refit=refit)
        if config.is_uniform or not allocator.measures_costs:
            shapes = _uniform_shapes(bounds, sizes, common, twin_of)
        else:
            check_budget(bounds.config, budget, multiple_of=multiples, layout=layout, fixed=sizes)
        return Request(shapes=allocator.alike(bounds, shapes), bounds=bounds, allocator=allocator, **common)
    target = _exact(options, config, layout, demand, multiples, common, prune_type)
    return Request(target=target, **common)


def _exact(
    options: TargetOptions,
    config: ModelConfig,
    layout: ParallelLayout,
    demand: Demand,
    multiples: dict[str, int],
    common: dict,
    prune_type: str,
) -> Target:
    """The shape whose sizes are named, checked."""
    uniform = {name.removesuffix("_remain"): getattr(options, name) for name in TargetOptions.SIZES}
    target = resolve_target(config, **uniform, by_layer=by_layer(options))
    target = dataclasses.replace(target, config=_untied(options, target.config))
    if target.config == config and not target.drop_layers:
        raise InputError("nothing to prune", got="no size smaller than the model's", do="ask for a smaller size, or drop layers")
    check_multiples(config, target.config, multiples)
    check_target(config, target, layout, prune_type)
    if target.by_layer:
        check_kinds(config, target.config)
    demand.check(_trimmed(common, target.config), before=_trimmed(common, config))
    _check_axes(config, target, common)
    return target


def _trimmed(common: dict, config: ModelConfig) -> ModelConfig:
    """A shape with the tokens that will stay."""
    plan = common.get("vocab_plan")
    return config if plan is None else dataclasses.replace(config, vocab_size=len(plan.vocab))


def _by_layer_plan(options: TargetOptions, model: Opened) -> ModelConfig:
    """The model that a plan leaves whose layers differ.

    Raises:
        InputError: if a budget is named too, its layers are alike, or its tokens are not named.
    """
    if several := [flag(name) for name in ("params", "ratio", "memory") if getattr(options, name) is not None]:
        raise InputError(f"--uniform and {', '.join(several)} both say how large the model becomes", do="give one of the two")
    if options.allocate != "uniform":
        raise InputError(f"--uniform and --allocate {options.allocate}", do="give one of the two")
    if not model.config.is_uniform:
        got, do = "one whose layers differ already", "prune the model that it was cut from, with that one's plan"
        raise InputError("--uniform starts from a model whose layers are alike", got=got, do=do)
    plan = load_plan(Path(options.plan))
    check_plan(plan, model.config, options.plan)
    if plan.vocab is not None and not options.vocab_plan:
        do = f"name its tokens with --vocab-plan {options.plan}"
        raise PlanError(f"--uniform: {options.plan} cuts the vocabulary too", do=do)
    tokens = load_plan(Path(options.vocab_plan)) if options.vocab_plan else None
    new = plan.with_tokens_of(tokens).new_config(model.config)
    if model.config.tie_embeddings and not new.tie_embeddings and not options.untie:
        raise PlanError(f"--uniform: {options.plan} gives the head a matrix of its own", do="give --untie too")
    if new.is_uniform:
        raise PlanError(f"--uniform: the layers of {options.plan} are alike", do="leave --uniform out")
    return new


def _check_model(plan: Plan, path: str, model: Opened) -> None:
    if None not in (plan.content_id, model.identity) and plan.content_id != model.identity:
        raise PlanError(
            f"{path} was made from another model of the same shape",
            got=plan.content_id,
            needed=model.identity,
            do='set "content_id" to null in the plan to apply it all the same',
        )


def _untied(options: TargetOptions, config: ModelConfig) -> ModelConfig:
    if options.untie and not config.tie_embeddings:
        raise InputError("--untie", got="a model whose head is a matrix of its own already")
    return dataclasses.replace(config, tie_embeddings=config.tie_embeddings and not options.untie)


def _uniform_shapes(
    bounds: Bounds, sizes: dict[str, object], common: dict, twin_of: ModelConfig | None
) -> tuple[ModelConfig, ...]:
    """Shapes that meet the budget along the axes that the metrics can score, all layers alike.

    Args:
        twin_of: a model whose layers differ: its axes alone are cut, and FFN channels, which use up what is left.
    """
    able = [axis for axis in AXES.names() if axis in metric_facts(common["metric_of"][axis]).axes]
    if twin_of is not None:
        able = [axis for axis in able if axis == "ffn" or axis in cut_axes(bounds.config, twin_of)]

    return tuple(uniform_shapes(bounds, fixed=sizes, axes=tuple(able)))


def _check_axes(config: ModelConfig, target: Target, common: dict) -> None:
    """Refuse a cut along an axis that the metric cannot score."""
    for axis, _ in needed_scores(config, target):
        name = common["metric_of"][axis]
        if not (axis == "hidden" and common["rotate"]):
            check_scores_axis(name, axis)


def _read(
    options: TargetOptions,
    model: Opened,
    layout: ParallelLayout,
    demand: Demand,
    prune_type: str,
    has_text: bool,
) -> Plan:
    extra = [
        flag(item.name) for item in fields(TargetOptions) if item.name != "plan" and getattr(options, item.name) != item.default
    ]
    if prune_type != "balance":
        extra.append("--prune-type")
    if extra:
        raise InputError(f"--plan and {', '.join(extra)} both say what stays", do="give one of the two")
    plan, config = load_plan(Path(options.plan)), model.config
    check_plan(plan, config, options.plan)
    if plan.rotated and config.after_norms:
        raise PlanError(f"{options.plan} rotates the stream", got=NO_ROTATION, needed="a plan that keeps channels as they are")
    if plan.rotated and not has_text:
        raise PlanError(f"{options.plan} rotates the stream, which needs text", do="name some with --data (--data=self will do)")
    if layout.tensor == 1:
        plan = plan.without_shards()
    uneven = plan.shard_sizes()
    wrong = sorted({len(counts) for counts in uneven.values()} - {layout.tensor})
    if wrong:
        raise PlanError(
            f"{options.plan} deals units over {wrong[0]} ranks", needed=layout.tensor, do="remove its shards, or use that TP"
        )
    if not uneven:
        layout.check(plan.new_config(config))
    demand.check(plan.new_config(config))
    _check_model(plan, options.plan, model)
    return plan
