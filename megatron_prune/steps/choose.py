"""Where a plan comes from: a file, or a metric's scores under a request for a shape."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Callable, ClassVar

from megatron_prune.arch.sharding import ParallelLayout
from megatron_prune.arch.tensors import tensor_ids
from megatron_prune.checkpoint.tensor_map import TensorMap
from megatron_prune.errors import InputError, PlanError
from megatron_prune.families.family import Family
from megatron_prune.importance.metric import METRICS
from megatron_prune.importance.scoring import score
from megatron_prune.planning.plan import Plan, check_plan, load_plan, make_plan
from megatron_prune.planning.selection import needed_scores
from megatron_prune.planning.target import check_parallel, resolve_target
from megatron_prune.runtime.world import World
from megatron_prune.steps.output import progress_bar


@dataclass(frozen=True, kw_only=True)
class PlanRequest:
    """What was asked for: sizes that remain (``None``: all) and how to choose, or a plan file."""

    hidden_size_remain: int | None = None
    ffn_hidden_size_remain: int | None = None
    num_attention_heads_remain: int | None = None
    num_query_groups_remain: int | None = None
    num_layers_remain: int | None = None
    drop_layers: tuple[int, ...] | None = None
    prune_type: str = "balance"
    metric: str = "random"
    seed: int = 1234
    plan: str | None = None

    SIZES: ClassVar[tuple[str, ...]] = (
        "hidden_size_remain",
        "ffn_hidden_size_remain",
        "num_attention_heads_remain",
        "num_query_groups_remain",
        "num_layers_remain",
        "drop_layers",
    )


def obtain_plan(
    request: PlanRequest,
    tensors: TensorMap,
    layout: ParallelLayout,
    family: Family,
    content_id: Callable[[], str],
    world: World,
) -> Plan:
    """Read or make the plan; the same on every process.

    Args:
        tensors: the model to prune.
        layout: the parallel layout of this run.
        family: what the result must be expressible as.
        content_id: tells the model's digest (asked for only when needed: it may have to read the model).

    Raises:
        InputError: if the request or the plan does not fit the model, the layout or the family.
    """
    layout.check(tensors.config)
    return (_read if request.plan else _make)(request, tensors, layout, family, content_id, world)


def _make(
    request: PlanRequest,
    tensors: TensorMap,
    layout: ParallelLayout,
    family: Family,
    content_id: Callable[[], str],
    world: World,
) -> Plan:
    config = tensors.config
    metric = METRICS.get(request.metric)(seed=request.seed)
    target = resolve_target(
        config,
        hidden_size=request.hidden_size_remain,
        ffn_hidden_size=request.ffn_hidden_size_remain,
        num_attention_heads=request.num_attention_heads_remain,
        num_query_groups=request.num_query_groups_remain,
        num_layers=request.num_layers_remain,
        drop_layers=request.drop_layers,
    )
    if target.config == config and not target.drop_layers:
        raise InputError("nothing to prune", got="no size smaller than the model's", do="ask for a smaller size, or drop layers")
    check_parallel(config, target.config, layout, request.prune_type)
    family.check_expressible(target.config)
    total = sum(tensors.nbytes(tensor) for tensor in tensor_ids(config)) // (layout.tensor * layout.pipeline)
    with progress_bar("scoring", total, shown=world.is_main and metric.reads_weights) as advance:
        scores = score(metric, tensors, layout, needed_scores(config, target), world, advance)
    made_by = {
        "metric": request.metric,
        "prune_type": request.prune_type,
        "seed": request.seed,
        "tensor_parallel": layout.tensor,
        "pipeline_parallel": layout.pipeline,
    }
    return make_plan(
        config,
        target,
        scores,
        prune_type=request.prune_type,
        ranks=layout.tensor,
        made_by=made_by,
        content_id=content_id(),
    )


def _read(
    request: PlanRequest,
    tensors: TensorMap,
    layout: ParallelLayout,
    family: Family,
    content_id: Callable[[], str],
    world: World,
) -> Plan:
    default = PlanRequest()
    names = (*PlanRequest.SIZES, "prune_type", "metric", "seed")
    extra = [f"--{name}" for name in names if getattr(request, name) != getattr(default, name)]
    if extra:
        raise InputError(f"--plan and {', '.join(extra)} both say what stays", do="give one of the two")
    plan = load_plan(Path(request.plan))
    check_plan(plan, tensors.config, request.plan)
    if layout.tensor == 1:
        plan = plan.without_shards()
    uneven = plan.shard_sizes()
    wrong = sorted({len(counts) for counts in uneven.values()} - {layout.tensor})
    if wrong:
        raise PlanError(
            f"{request.plan} deals units over {wrong[0]} ranks", needed=layout.tensor, do="remove its shards, or use that TP"
        )
    if not uneven:
        layout.check(plan.new_config(tensors.config))
    family.check_expressible(plan.new_config(tensors.config))
    if plan.content_id is not None and plan.content_id != content_id():
        raise PlanError(
            f"{request.plan} was made from another model of the same shape",
            got=plan.content_id,
            needed=content_id(),
            do='set "content_id" to null in the plan to apply it all the same',
        )
    return plan
