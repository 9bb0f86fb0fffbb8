"""Applying a metric to a checkpoint under TP × PP: every rank reads its own shards, tensor by tensor.

A unit that one rank holds whole (a feed-forward channel, a KV group) is summed there and nowhere else, so its score has
the same bits at every TP. A residual channel lies on all ranks: its float64 partial sums are added in rank order, the
same on every process, and differ between TP sizes by rounding only (about 1e-15 relative).
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass
from typing import Callable

import torch

from megatron_prune.arch.model import ModelConfig
from megatron_prune.arch.sharding import ParallelLayout
from megatron_prune.arch.tensors import ROLES, TensorId, tensor_ids
from megatron_prune.axes.axis import AXES
from megatron_prune.checkpoint.region import close_files
from megatron_prune.checkpoint.tensor_map import TensorMap
from megatron_prune.importance.metric import Metric
from megatron_prune.planning.selection import Scores
from megatron_prune.runtime.world import World


@dataclass(frozen=True, slots=True)
class Place:
    """One process's coordinates: tensor-parallel rank, pipeline stage, and its number among data-parallel copies."""

    tensor: int
    stage: int
    copy: int
    copies: int

    @classmethod
    def of(cls, world: World, layout: ParallelLayout) -> Place:
        """Megatron's order: tensor-parallel ranks are neighbours, then data-parallel copies, then pipeline stages."""
        copies = world.size // (layout.tensor * layout.pipeline)
        return cls(
            world.rank % layout.tensor,
            world.rank // (layout.tensor * copies),
            world.rank // layout.tensor % copies,
            copies,
        )


def score(
    metric: Metric,
    tensors: TensorMap,
    layout: ParallelLayout,
    wanted: list[tuple[str, int | None]],
    world: World,
    progress: Callable[[int], None] = lambda count: None,
) -> Scores:
    """Scores for every wanted (axis, layer), full and the same on every process."""
    config = tensors.config
    totals: Scores = {key: torch.zeros(AXES.get(key[0]).count(config), dtype=torch.float64) for key in wanted}
    if metric.reads_weights and wanted:
        mine = _partial_sums(metric, tensors, layout, wanted, Place.of(world, layout), progress)
        for part in world.all_gather(mine):
            for key, pieces in part.items():
                for start, piece in pieces:
                    totals[key][start : start + piece.numel()] += piece
        close_files()
    return {(axis, layer): metric.finish(axis, layer, total) for (axis, layer), total in totals.items()}


Pieces = dict[tuple[str, int | None], list[tuple[int, torch.Tensor]]]


def _partial_sums(
    metric: Metric,
    tensors: TensorMap,
    layout: ParallelLayout,
    wanted: list[tuple[str, int | None]],
    place: Place,
    progress: Callable[[int], None],
) -> Pieces:
    """(axis, layer) → [(first unit, sums)] over the blocks this process holds; replicated tensors are counted once."""
    config, keys = tensors.config, set(wanted)
    sums: dict[tuple[str, int | None], dict[int, torch.Tensor]] = defaultdict(dict)
    for tensor in tensor_ids(config):
        if not _holds(tensor, layout, config, place) or not _asked(tensor, keys):
            continue
        ranges = [local_elements(label, config, place.tensor, layout.tensor) for label in ROLES[tensor.role]]
        if not any(_is_split(label) for label in ROLES[tensor.role]) and place.tensor > 0:
            continue
        block = tensors.read_block(tensor, ranges[0], ranges[1] if len(ranges) > 1 else None)
        progress(block.nbytes)
        values = metric.per_weight(tensor.role, block)
        for axis_name in AXES.names():
            axis = AXES.get(axis_name)
            key = (axis_name, tensor.layer if axis.per_layer else None)
            if key not in keys:
                continue
            if axis_name == "layer":
                _add(sums[key], tensor.layer, values.sum(dtype=torch.float64).view(1))
            elif (total := axis.total(tensor.role, values, config)) is not None:
                _add(sums[key], axis.local_units(config, place.tensor, layout.tensor).start, total)
    return {key: sorted(pieces.items()) for key, pieces in sums.items()}


def _add(pieces: dict[int, torch.Tensor], start: int, values: torch.Tensor) -> None:
    pieces[start] = pieces[start] + values if start in pieces else values


def local_elements(label: str, config: ModelConfig, rank: int, ranks: int) -> range:
    """Elements of a labelled dimension that a tensor-parallel rank scores: whole units, as even as can be."""
    if label == "vocab":
        return range(rank * config.vocab_size // ranks, (rank + 1) * config.vocab_size // ranks)
    if label in ("hidden", "head_dim"):
        return range(config.dims[label])
    units = AXES.get(label).local_units(config, rank, ranks)
    each = AXES.get(label).owns(config)[label]
    return range(units.start * each, units.stop * each)


def _is_split(label: str) -> bool:
    return label not in ("hidden", "head_dim")


def _holds(tensor: TensorId, layout: ParallelLayout, config: ModelConfig, place: Place) -> bool:
    """Whether this process scores a tensor: its stage's layers, dealt over data-parallel copies."""
    if tensor.layer is None:
        stage = 0 if tensor.role == "embedding" else layout.pipeline - 1
        return place.stage == stage and place.copy == 0
    return place.stage == layout.stage_of(tensor.layer, config.num_layers) and tensor.layer % place.copies == place.copy


def _asked(tensor: TensorId, keys: set[tuple[str, int | None]]) -> bool:
    if ("hidden", None) in keys and "hidden" in ROLES[tensor.role]:
        return True
    if tensor.layer is None:
        return False
    inner = {label for label in ROLES[tensor.role]} | ({"kv_head"} if "head" in ROLES[tensor.role] else set())
    return ("layer", None) in keys or any((label, tensor.layer) in keys for label in inner)
