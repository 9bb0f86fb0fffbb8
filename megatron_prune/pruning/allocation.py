"""How a budget is to be dealt out to layers: what is asked for, and what it has to keep to."""

from __future__ import annotations

from dataclasses import replace

from megatron_prune.arch.model import ModelConfig
from megatron_prune.arch.sharding import ParallelLayout
from megatron_prune.axes.axis import layer_axes
from megatron_prune.errors import InputError, reason
from megatron_prune.planning.allocators.allocator import Bounds
from megatron_prune.planning.budget import Budget
from megatron_prune.pruning.metric_facts import check_scores_axis
from megatron_prune.pruning.options import AllocationOptions
from megatron_prune.serving.demand import Demand


def read_bounds(
    options: AllocationOptions,
    config: ModelConfig,
    budget: Budget,
    multiples: dict[str, int],
    layout: ParallelLayout,
    demand: Demand,
    *,
    prune_type: str,
) -> Bounds:
    """What shapes within the budget have to keep to.

    Args:
        config: the model before pruning, its head untied if it is to be.
        demand: what it will be written as, and where it is to be served.

    Raises:
        InputError: if a limit is no share.
    """
    least, most = options.min_layer_ratio, options.max_layer_ratio
    if not (0 <= least <= most <= 1 and most > 0):
        raise InputError(
            "--min-layer-ratio, --max-layer-ratio", got=f"{least:g}, {most:g}", needed="shares of 0 to 1, the first no larger"
        )
    return Bounds(
        config=config,
        budget=budget,
        multiple_of=multiples,
        layout=layout,
        prune_type=prune_type,
        check=demand.family.check_expressible,
        least=least,
        most=most,
        unserved=lambda shape: demand.problems(replace(shape, vocab_size=budget.vocab_size or shape.vocab_size)),
        layer_unserved=demand.layer_problems,
    )


def check_allocation(bounds: Bounds, metric_of: dict[str, str], *, has_text: bool, refit: bool) -> None:
    """Refuse an allocation by measured costs that cannot be measured, judged or written.

    Raises:
        InputError: saying what is missing, or that the model's class cannot say layers that differ.
    """
    if not has_text or not refit:
        got = "--no-refit" if has_text else "no text"
        do = "name text with --data (--data=self will do), without --no-refit"
        raise InputError("--allocate free measures on text, and compares re-fitted models", got=got, do=do)
    for axis in layer_axes():
        check_scores_axis(metric_of[axis], axis)
    config = bounds.config
    if config.is_uniform and config.num_layers > 1 and config.units("ffn") > 1:
        differing = (config.units("ffn") - 1, *[config.units("ffn")] * (config.num_layers - 1))
        what, do = "--allocate free makes layers of different sizes", "leave --allocate free out, or --target-family"
        try:
            bounds.check(replace(config, ffn_hidden_size=differing))
        except InputError as error:
            do += " (then what can say such layers is written)"
            raise InputError(what, got=reason(error), do=do) from None
        able = lambda width: not bounds.layer_unserved(replace(config, ffn_hidden_size=width))
        if not any(able(width) for width in range(config.units("ffn"), 0, -1)):
            raise InputError(what, got="--serve: " + "; ".join(bounds.layer_unserved(config)), do=do + ", or ask less of --serve")
