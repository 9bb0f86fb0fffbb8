"""Where a plan comes from: a file, or a metric's scores under a request for a shape or a budget."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, fields
from pathlib import Path
from typing import ClassVar

from megatron_prune.arch.model import ModelConfig
from megatron_prune.arch.sharding import ParallelLayout
from megatron_prune.arch.tensors import parameter_count
from megatron_prune.axes.axis import AXES
from megatron_prune.config import option, require_positive
from megatron_prune.errors import InputError, PlanError, raise_all
from megatron_prune.families.family import Family
from megatron_prune.importance.metric import METRICS, metric_named
from megatron_prune.opening.opened import Opened
from megatron_prune.planning.allocators.allocator import ALLOCATORS, Allocator, Bounds
from megatron_prune.planning.budget import read_budget
from megatron_prune.planning.check import check_plan, kept_tokens
from megatron_prune.planning.layer_sizes import Sizes, dropped, read_layer_sizes
from megatron_prune.planning.loss_estimate import cut_axes
from megatron_prune.planning.make import whole_plan
from megatron_prune.planning.multiples import check_multiples, parse_multiples
from megatron_prune.planning.plan import Plan, load_plan
from megatron_prune.planning.selection import needed_scores
from megatron_prune.planning.shapes import candidates, check_budget
from megatron_prune.planning.target import CHOSEN_BY_LAYER, Target, check_target, resolve_target
from megatron_prune.pruning.allocation import AllocationOptions, check_allocation, read_bounds
from megatron_prune.surgery.basis import HIDDEN_METHODS, NO_ROTATION

BEST = {"hidden": "activation", "ffn": "fisher", "head": "obs", "kv_head": "obs", "layer": "fold"}
"""Axis → how units are chosen where nothing else is asked for: what measured best before least squares in first trials
(channels: perplexity 61.2 by ``fisher``, 63.2 by ``activation``, 65.1 by ``obs`` on one protocol)."""


@dataclass(frozen=True, kw_only=True)
class TargetOptions(AllocationOptions):
    """The shape to reach, or a budget to keep to, and how units are chosen; or a plan."""

    hidden_size_remain: int | None = option("residual channels that stay", None)
    ffn_hidden_size_remain: int | None = option("feed-forward channels that stay in every layer", None)
    num_attention_heads_remain: int | None = option("query heads that stay in every layer", None)
    num_query_groups_remain: int | None = option("KV groups that stay in every layer", None)
    num_layers_remain: int | None = option("layers that stay, chosen by the depth metric", None)
    drop_layers: tuple[int, ...] | None = option("layers that go, 0-based, such as 7,13", None)
    drop_attention: tuple[int, ...] | None = option("layers whose attention goes alone, 0-based, such as 3,7", None)
    drop_mlp: tuple[int, ...] | None = option("layers whose feed-forward block goes alone, 0-based", None)
    layer_sizes: str | None = option(
        'JSON file of sizes by layer, such as {"3": {"ffn_hidden_size": 800, "num_query_groups": 2}, "5": {"mlp": "none"}}', None
    )
    uniform: bool = option(
        "turn a plan whose layers differ (--plan) into the shape with layers alike and as many parameters", False
    )
    params: str | None = option("budget: at most this many parameters as stored, such as 90M", None)
    ratio: float | None = option("budget: share of all parameters to remove, such as 0.25", None)
    memory: str | None = option("budget: weights and KV cache of an inference, such as 2GiB", None)
    memory_seq_length: int = option("tokens in the KV cache of --memory", 4096)
    memory_batch: int = option("sequences in the KV cache of --memory", 1)
    search: int = option(
        "within a budget, re-fit this many of the shapes that look best and keep what loses least on held-out text", 1
    )
    multiple_of: str | None = option("sizes are multiples of these, such as hidden=64,ffn=128", None)
    metric: str | None = option(
        "how units are scored: random, magnitude, activation, wanda, taylor …, with parameters where it has any, as in "
        "obs:damping=0.1 (default: what measured best for each axis)",
        None,
    )
    depth_metric: str | None = option(
        "how layers are chosen (default: fold where there is text, angular with --no-refit, else the metric)", None
    )
    hidden_method: str | None = option(
        "how hidden units are cut (default: rotate where there is text, what stays is re-fitted and the model allows it, else select)",
        None,
        choices=HIDDEN_METHODS,
    )
    untie: bool = option("store the head of a tied model as a matrix of its own", False)
    plan: str | None = option("apply this plan instead of making one", None)
    vocab_plan: str | None = option("keep the tokens of this plan (of megatron-prune vocab select) alone", None)

    SIZES: ClassVar[tuple[str, ...]] = (
        "hidden_size_remain",
        "ffn_hidden_size_remain",
        "num_attention_heads_remain",
        "num_query_groups_remain",
        "num_layers_remain",
        "drop_layers",
    )
    BY_LAYER: ClassVar[tuple[str, ...]] = ("drop_attention", "drop_mlp", "layer_sizes")


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
        return set(CHOSEN_BY_LAYER) if self.allocator.measures_costs else set()

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
        scored = "hidden" in metric_named(self.metric_of["hidden"]).axes
        return {"hidden"} if tied and scored and self.rotate and not self.by_name else set()

    def fallback_metrics(self, config: ModelConfig) -> set[str]:
        """Names of the metrics whose scores are needed then."""
        return {self.metric_of[axis] for axis in self.fallback(config)}

    def moments(self, config: ModelConfig) -> frozenset[str]:
        """Sites whose second moments those metrics read."""
        axes = self.axes(config) | self.fallback(config)
        kinds = ((axis, metric_named(self.metric_of[axis])) for axis in axes)
        return frozenset(kind.moments[axis] for axis, kind in kinds if axis in kind.moments)


def metrics_of(options: TargetOptions, *, has_text: bool, held: list[str] | None = None, refit: bool = True) -> dict[str, str]:
    """Axis → metric: as asked for, else the best (of those whose scores are ``held``, where scores were named).

    Args:
        refit: whether what stays is re-fitted; ``fold`` judges layers by what that leaves.

    Raises:
        InputError: if there is no such metric, or it takes no such parameters.
    """
    chosen = {axis: options.metric or _best(axis, held) for axis in BEST}
    if has_text and not (options.metric and metric_named(options.metric).block_wise):
        chosen["layer"] = _best("layer", held) if refit else "angular"
    chosen["layer"] = options.depth_metric or chosen["layer"]
    return {axis: metric_named(name).spelling for axis, name in chosen.items()}


def _best(axis: str, held: list[str] | None) -> str:
    able = [name for name in held or () if axis in metric_named(name).axes]
    return min(able or [BEST[axis]], key=lambda name: (name != BEST[axis], metric_named(name).name != BEST[axis]))


def read_request(
    options: TargetOptions,
    model: Opened,
    layout: ParallelLayout,
    family: Family,
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
        family: what the result is written as.
        has_text: whether there is calibration text.
        held: metrics whose scores were made before.
        refit: whether what stays is re-fitted.

    Raises:
        InputError: if the request or the plan does not fit the model, the layout or the family.
    """
    config = model.config
    layout.check(config)
    require_positive(options, "search", "memory_seq_length", "memory_batch")
    by_name = options.hidden_method == "rotate"
    if by_name and not has_text:
        raise InputError("--hidden_method rotate needs text to find the subspace", do="name some with --data, or use select")
    if by_name and config.after_norms:
        raise InputError("--hidden_method rotate", got=NO_ROTATION, do="use select, or leave it out")
    rotate = by_name or (options.hidden_method is None and has_text and refit and not config.after_norms)
    metric_of = metrics_of(options, has_text=has_text, held=held, refit=refit)
    common = {"metric_of": metric_of, "rotate": rotate, "by_name": by_name}
    if options.uniform and not options.plan:
        raise InputError("--uniform without --plan", do="name the plan whose layers differ")
    if options.plan and not options.uniform:
        plan = _read(options, model, layout, family, prune_type, has_text)
        return Request(plan=plan.with_tokens_of(None), vocab_plan=plan if plan.vocab is not None else None, **common)
    if options.vocab_plan:
        vocab_plan = common["vocab_plan"] = load_plan(Path(options.vocab_plan))
        kept_tokens(vocab_plan, config, options.vocab_plan)
        if vocab_alone(options):
            return Request(plan=whole_plan(config, vocab_plan.made_by, model.identity), **common)
    multiples = parse_multiples(options.multiple_of) if options.multiple_of else {}
    budget = read_budget(
        params=_as_large_as(options, model) if options.uniform else options.params,
        ratio=options.ratio,
        memory=options.memory,
        seq_length=options.memory_seq_length,
        batch=options.memory_batch,
        dtype_bytes=model.dtype.itemsize,
    )
    sizes = {name: getattr(options, name) for name in (*TargetOptions.SIZES, *TargetOptions.BY_LAYER)}
    if budget is not None:
        budget = dataclasses.replace(budget, vocab_size=len(vocab_plan.vocab) if options.vocab_plan else None)
        bounds = read_bounds(options, _untied(options, config), budget, multiples, layout, family, prune_type=prune_type)
        allocator, shapes = ALLOCATORS.get(options.allocate), ()
        if config.is_uniform or not allocator.measures_costs:
            shapes = _uniform_shapes(bounds, sizes, common)
        else:
            check_budget(bounds.config, budget, multiple_of=multiples, layout=layout, fixed=sizes)
        if allocator.measures_costs:
            check_allocation(bounds, common["metric_of"], has_text=has_text, refit=refit)
        return Request(shapes=shapes, bounds=bounds, allocator=allocator, **common)
    uniform = {name.removesuffix("_remain"): getattr(options, name) for name in TargetOptions.SIZES}
    target = resolve_target(config, **uniform, by_layer=_by_layer(options))
    target = dataclasses.replace(target, config=_untied(options, target.config))
    if target.config == config and not target.drop_layers:
        raise InputError("nothing to prune", got="no size smaller than the model's", do="ask for a smaller size, or drop layers")
    check_multiples(config, target.config, multiples)
    check_target(config, target, layout, prune_type)
    family.check_expressible(target.config)
    _check_axes(config, target, common)
    return Request(target=target, **common)


def _by_layer(options: TargetOptions) -> Sizes:
    """Sizes of single layers.

    Raises:
        InputError: if two options say the same layer's.
    """
    parts = [
        dropped(options.drop_attention, "attention", "--drop_attention"),
        dropped(options.drop_mlp, "mlp", "--drop_mlp"),
        read_layer_sizes(Path(options.layer_sizes)) if options.layer_sizes else {},
    ]
    found: Sizes = {}
    for part in parts:
        twice = sorted({layer for axis, layer in part if (axis, layer) in found})
        raise_all(InputError, "sizes by layer", [f"layer {layer} is named by two options" for layer in twice])
        found |= part
    return found


def _as_large_as(options: TargetOptions, model: Opened) -> str:
    """The parameters of the model that a plan leaves.

    Raises:
        InputError: if a budget is named too, its layers are alike, or its tokens are not named.
    """
    if several := [f"--{name}" for name in ("params", "ratio", "memory") if getattr(options, name) is not None]:
        raise InputError(f"--uniform and {', '.join(several)} both say how large the model becomes", do="give one of the two")
    plan = load_plan(Path(options.plan))
    check_plan(plan, model.config, options.plan)
    if plan.vocab is not None and not options.vocab_plan:
        do = f"name its tokens with --vocab_plan {options.plan}"
        raise PlanError(f"--uniform: {options.plan} cuts the vocabulary too", do=do)
    tokens = load_plan(Path(options.vocab_plan)) if options.vocab_plan else None
    new = plan.with_tokens_of(tokens).new_config(model.config)
    if new.is_uniform:
        raise PlanError(f"--uniform: the layers of {options.plan} are alike", do="leave --uniform out")
    return str(parameter_count(new))


def vocab_alone(options: TargetOptions) -> bool:
    """Whether nothing but the vocabulary is to be cut."""
    others = (*TargetOptions.SIZES, *TargetOptions.BY_LAYER, "params", "ratio", "memory", "plan")
    return bool(options.vocab_plan) and not options.untie and all(getattr(options, name) is None for name in others)


def _check_model(plan: Plan, path: str, model: Opened) -> None:
    if plan.content_id is not None and plan.content_id != model.identity:
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


def _uniform_shapes(bounds: Bounds, sizes: dict[str, object], common: dict) -> tuple[ModelConfig, ...]:
    """Shapes that meet the budget along the axes that the metrics can score, all layers alike."""

    def legal(shape: ModelConfig) -> bool:
        try:
            bounds.check(shape)
        except InputError:
            return False
        return True

    found = candidates(
        bounds.config,
        bounds.budget,
        multiple_of=bounds.multiple_of,
        layout=bounds.layout,
        prune_type=bounds.prune_type,
        legal=legal,
        fixed=sizes,
        axes=tuple(axis for axis in AXES.names() if axis in metric_named(common["metric_of"][axis]).axes),
    )
    return tuple(found)


def _check_axes(config: ModelConfig, target: Target, common: dict) -> None:
    """Refuse a cut along an axis that the metric cannot score."""
    for axis, _ in needed_scores(config, target):
        name = common["metric_of"][axis]
        if axis not in metric_named(name).axes and not (axis == "hidden" and common["rotate"]):
            able = [other for other in METRICS.names() if axis in METRICS.get(other).axes]
            raise InputError(f"metric {name} cannot score the axis {axis}", needed="one of " + ", ".join(able))


def _read(
    options: TargetOptions,
    model: Opened,
    layout: ParallelLayout,
    family: Family,
    prune_type: str,
    has_text: bool,
) -> Plan:
    extra = [
        f"--{item.name}" for item in fields(TargetOptions) if item.name != "plan" and getattr(options, item.name) != item.default
    ]
    if prune_type != "balance":
        extra.append("--prune_type")
    if extra:
        raise InputError(f"--plan and {', '.join(extra)} both say what stays", do="give one of the two")
    plan, config = load_plan(Path(options.plan)), model.config
    check_plan(plan, config, options.plan)
    if plan.rotated and config.after_norms:
        raise PlanError(f"{options.plan} rotates the stream", got=NO_ROTATION, needed="a plan that keeps channels as they are")
    if plan.rotated and not has_text:
        raise PlanError(f"{options.plan} rotates the stream, which needs text", do="name some with --data (--data self will do)")
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
    family.check_expressible(plan.new_config(config))
    _check_model(plan, options.plan, model)
    return plan
