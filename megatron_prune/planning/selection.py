"""From scores to kept units, under tensor parallelism.

``balance``: every rank keeps the same number of its own units. ``global``: the best over all ranks, dealt out anew in
equal shares (feed-forward channels and KV groups may stand on any rank). ``unbalance``: the best over all ranks, each
staying on the rank that holds it when this run's ranks share the units evenly, so that shards may differ in size.
"""

from __future__ import annotations

import torch

from megatron_prune.arch.model import ModelConfig
from megatron_prune.axes.axis import AXES

Scores = dict[tuple[str, int | None], torch.Tensor]
"""(axis, layer or None) → float64 [units] by global unit id; larger is more important.

``("block", n)`` → float64 [layers - n + 1]: n consecutive layers as a whole, by the first of them.
"""


def best(scores: torch.Tensor, keep: int) -> list[int]:
    """Ids of the ``keep`` largest scores, ascending; among equals the lower id stays."""
    order = torch.sort(scores, descending=True, stable=True).indices
    return sorted(order[:keep].tolist())


def best_by_rank(scores: torch.Tensor, keep: int, parts: list[range]) -> list[int]:
    """The best of every rank's own units, the same number on each (``keep`` divides by the number of ranks)."""
    each = keep // len(parts)
    return [part.start + unit for part in parts for unit in best(scores[part.start : part.stop], each)]


def keep_units(axis_name: str, scores: torch.Tensor, keep: int, config: ModelConfig, ranks: int, prune_type: str) -> list[int]:
    """Kept units of one axis (in one layer), ascending."""
    axis = AXES.get(axis_name)
    if prune_type == "balance" and axis.sharded:
        return best_by_rank(scores, keep, [axis.local_units(config, rank, ranks) for rank in range(ranks)])
    return best(scores, keep)


def keep_heads(scores: torch.Tensor, groups: list[int], per_group: int, config: ModelConfig) -> list[int]:
    """Kept query heads: the best ``per_group`` of every kept KV group, group by group."""
    n = config.heads_per_group
    return [group * n + head for group in groups for head in best(scores[group * n : (group + 1) * n], per_group)]


def keep_layers(scores: Scores, count: int, keep: int) -> list[int]:
    """Kept layers, ascending: all but the least important block where blocks were scored, else the best one by one."""
    blocks = scores.get(("block", count - keep))
    if blocks is None:
        return best(scores["layer", None], keep)
    start = int(blocks.argmin())  # of equals the first
    return [layer for layer in range(count) if not start <= layer < start + count - keep]


def shard_counts(axis_name: str, kept: list[int], config: ModelConfig, ranks: int) -> list[int]:
    """How many of the kept units every rank held before."""
    parts = [AXES.get(axis_name).local_units(config, rank, ranks) for rank in range(ranks)]
    return [sum(unit in part for unit in kept) for part in parts]
