"""Applying a metric to a checkpoint under TP × PP: every rank reads its own shards, tensor by tensor.

A unit that one rank holds whole (a feed-forward channel, a KV group) is summed there and nowhere else. A residual channel
lies on all ranks: its partial sums are added in rank order, the same on every process. Sums are float64, so scores at
different TP sizes differ by rounding only (about 1e-15 relative).
"""

from __future__ import annotations

import logging
from dataclasses import dataclass
from itertools import chain
from typing import Callable

import torch

from megatron_prune.arch.blocks.block import kind_of, spaces
from megatron_prune.arch.model import ModelConfig
from megatron_prune.arch.sharding import ParallelLayout
from megatron_prune.arch.tensors import EMBEDDING, TensorId, offset_of, tensor_ids
from megatron_prune.axes.axis import AXES
from megatron_prune.checkpoint.tensor_map import TensorMap
from megatron_prune.errors import InputError
from megatron_prune.files.region import close_files
from megatron_prune.importance.metric import Metric
from megatron_prune.importance.whole_units import stored_units, unit_values
from megatron_prune.planning.selection import Scores
from megatron_prune.runtime.world import World

log = logging.getLogger("megatron_prune")

CHUNK_ELEMENTS = 1 << 23
"""Weights that are looked at together."""


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
    """Scores for every wanted (axis, layer), full and the same on every process.

    Of an axis over which the metric has a last word all places are scored, whichever are wanted.
    """
    config, asked = tensors.config, wanted
    if type(metric).conclude is not Metric.conclude:
        wanted = [(axis, place) for axis in dict.fromkeys(axis for axis, _ in asked) for place in AXES.get(axis).places(config)]
    units = lambda axis, layer: AXES.get(axis).count(config.of_layer(layer))
    totals: Scores = {key: torch.zeros(units(*key), dtype=torch.float64) for key in wanted}
    if (metric.reads_weights or _reads_units(metric)) and wanted:
        mine, error = [], None
        try:
            ways = [_partial_sums] * metric.reads_weights + [_whole_units] * _reads_units(metric)
            mine = [way(metric, tensors, layout, wanted, Place.of(world, layout), progress) for way in ways]
        except InputError as found:  # on the ranks that read a damaged part
            error = found
        world.agree(error)
        for part in chain.from_iterable(world.all_gather(mine)):
            for key, (start, piece) in part.items():
                totals[key][start : start + piece.numel()] += piece
        close_files()
    found = {key: metric.finish(*key, total) for key, total in totals.items()}
    for key in found:
        _check_said(metric, found[key], totals[key], f"{_place(key)}, from finite sums")
    concluded: Scores = {}
    for axis in dict.fromkeys(axis for axis, _ in wanted):
        concluded |= _concluded(metric, {key: value for key, value in found.items() if key[0] == axis})
    return {key: _sound(key, concluded[key], world) for key in asked}


def all_scores(metric: Metric, tensors: TensorMap, layout: ParallelLayout, world: World) -> Scores:
    """Scores of every axis the metric can score; with ``("block", n)`` for every n consecutive layers where it can."""
    config = tensors.config
    wanted: list[tuple[str, int | None]] = []
    for name in sorted(metric.axes):
        wanted += [(name, place) for place in AXES.get(name).places(config)]
    scores = score(metric, tensors, layout, wanted, world)
    if metric.block_wise:
        scores |= {("block", count): metric.block_scores(count) for count in range(1, config.num_layers)}
    return scores


def _concluded(metric: Metric, scores: Scores) -> Scores:
    """The last word of a metric over one axis; what is not finite stays so, and is the lowest finite score to the metric."""
    finite = torch.cat([value[value.isfinite()] for value in scores.values()] or [torch.zeros(0)])
    lowest = finite.min() if len(finite) else 0.0
    found = metric.conclude({key: torch.where(value.isfinite(), value, lowest) for key, value in scores.items()})
    if {key: value.shape for key, value in found.items()} != {key: value.shape for key, value in scores.items()}:
        raise TypeError(f"{metric.spelling}: conclude returned scores of other units than it was given")
    for key in scores:
        _check_said(metric, found[key], scores[key], f"{_place(key)}, as its last word")
    return {key: torch.where(scores[key].isfinite(), found[key], scores[key]) for key in scores}


def _check_said(metric: Metric, said: torch.Tensor, of: torch.Tensor, where: str) -> None:
    """Refuse what a metric makes of sound numbers that is none: broken weights are another thing (:func:`_sound`).

    Args:
        said, of: [units].

    Raises:
        InputError: naming the metric and the units.
    """
    broken = of.isfinite() & ~said.isfinite()
    if broken.any():
        first = int(broken.nonzero()[0])
        got = f"{float(said[first])} for unit {first}" + (f" and {int(broken.sum()) - 1} more" if broken.sum() > 1 else "")
        raise InputError(f"metric {metric.spelling} is not finite at {where}", got=got, needed="finite scores", do=MEND)


MEND = "mend the metric: a division by zero, a root or a logarithm of what is not positive"


def _place(key: tuple[str, int | None]) -> str:
    return key[0] if key[1] is None else f"{key[0]} in layer {key[1]}"


def _reads_units(metric: Metric) -> bool:
    """Whether whole units are shown to it here; a metric of gradients has seen them in the backward passes."""
    return metric.reads_units and "gradients" not in metric.needs


def _sound(key: tuple[str, int | None], scores: torch.Tensor, world: World) -> torch.Tensor:
    """Scores with NaN and infinity replaced by the lowest there is: a unit with broken weights goes first."""
    broken = ~scores.isfinite()
    if broken.any() and world.is_main:
        units = broken.nonzero().flatten().tolist()[:8]
        log.warning("%s: units %s have weights that are not finite and are dropped first", _place(key), units)
    return scores.masked_fill(broken, -torch.inf)


def _partial_sums(
    metric: Metric,
    tensors: TensorMap,
    layout: ParallelLayout,
    wanted: list[tuple[str, int | None]],
    place: Place,
    progress: Callable[[int], None],
) -> dict[tuple[str, int | None], tuple[int, torch.Tensor]]:
    """(axis, layer) → (first unit, sums from it on) over the blocks of this process; replicated tensors count once."""
    config = tensors.config
    mine = {key: AXES.get(key[0]).local_units(config.of_layer(key[1]), place.tensor, layout.tensor) for key in wanted}
    sums = {key: torch.zeros(len(units), dtype=torch.float64) for key, units in mine.items()}
    for tensor in tensor_ids(config):
        keys = [key for key in _owners(tensor, config.of_layer(tensor.layer)) if key in sums]
        labels, described = spaces(tensor.role), config.of_layer(tensor.layer)
        counted = place.tensor == 0 or any(label not in ("hidden", "head_dim") for label in labels)
        if not keys or not counted or not _holds(tensor, layout, config, place):
            continue
        held = [local_elements(label, described, place.tensor, layout.tensor) for label in labels]
        if not all(held):
            continue  # fewer KV groups than ranks: this one has none
        for rows in _row_chunks(held[0], labels[0], len(held[1]) if len(held) > 1 else 1, config, tensor.layer):
            weight = tensors.read_block(tensor, rows, *held[1:])
            if offset := offset_of(tensor.role, config):
                weight = weight.float() + offset
            for key in keys:
                values = metric.per_weight(key[0], tensor, weight, held[1] if len(held) > 1 else range(1))
                if key[0] == "layer":
                    sums[key][tensor.layer] += values.sum(dtype=torch.float64)
                for dim, part in enumerate([rows, *held[1:]]):
                    each = AXES.get(key[0]).owned(config, tensor.layer).get(labels[dim])
                    if each is not None and key[0] != "layer":
                        others = [other for other in range(values.dim()) if other != dim]
                        totals = values.sum(dim=others, dtype=torch.float64) if others else values.double()
                        first = part.start // each - mine[key].start
                        sums[key][first : first + totals.numel() // each] += totals.view(-1, each).sum(dim=1)
                if not sums[key].isfinite().all() and weight.isfinite().all() and not values.isfinite().all():
                    where = tensor.role if tensor.layer is None else f"{tensor.role} in layer {tensor.layer}"
                    got = f"NaN or infinity of the finite weights of {where}"
                    raise InputError(f"metric {metric.spelling} is not finite", got=got, needed="finite numbers", do=MEND)
            progress(weight.numel() * tensors.dtype(tensor).itemsize)
    return {key: (mine[key].start, total) for key, total in sums.items()}


def _whole_units(
    metric: Metric,
    tensors: TensorMap,
    layout: ParallelLayout,
    wanted: list[tuple[str, int | None]],
    place: Place,
    progress: Callable[[int], None],
) -> dict[tuple[str, int | None], tuple[int, torch.Tensor]]:
    """As :func:`_partial_sums`, of what a metric says of the units that fall to this process, each as a whole."""
    found = {}
    for axis, layer in wanted:
        config = tensors.config.of_layer(layer)
        units = AXES.get(axis).local_units(config, place.tensor, layout.tensor)
        if not units or not _holds_layer(layer, layout, tensors.config, place):
            continue
        values = []
        for some, parts in stored_units(tensors, axis, layer, units):
            values.append(unit_values(metric, axis, layer, parts, 0.0, config))
            sound = torch.stack([part.weight.flatten(1).isfinite().all(1) for part in parts.values()]).all(0)
            _check_said(metric, values[-1], torch.where(sound, 0.0, torch.nan), _place((axis, layer)))
            progress(sum(part.weight.numel() * tensors.dtype(TensorId(role, layer)).itemsize for role, part in parts.items()))
        found[axis, layer] = (units.start, torch.cat(values))
    return found


def _owners(tensor: TensorId, config: ModelConfig) -> list[tuple[str, int | None]]:
    """(axis, layer) pairs some of whose units own a part of a tensor."""
    kind, labels = kind_of(tensor.role), set(spaces(tensor.role))
    owners = [axis for axis in kind.axes if labels & AXES.get(axis).owns(config).keys()] if kind else []
    inner = [("layer", None), *((axis, tensor.layer) for axis in owners)] if kind else []
    return [("hidden", None), *inner] if "hidden" in labels else inner


def _row_chunks(rows: range, label: str, cols: int, config: ModelConfig, layer: int | None) -> list[range]:
    """``rows`` in pieces of whole units that stay small, so that an embedding is not held several times over."""
    unit = max((axis.owned(config, layer).get(label, 1) for axis in map(AXES.get, AXES.names())), default=1)
    step = max(1, CHUNK_ELEMENTS // (cols * unit)) * unit
    return [range(start, min(start + step, rows.stop)) for start in range(rows.start, rows.stop, step)]


def local_elements(label: str, config: ModelConfig, rank: int, ranks: int) -> range:
    """Elements of a labelled dimension that a tensor-parallel rank scores: whole units, as even as can be."""
    if label == "vocab":
        return range(rank * config.vocab_size // ranks, (rank + 1) * config.vocab_size // ranks)
    if label in ("hidden", "head_dim"):
        return range(config.size(label))
    units = AXES.get(label).local_units(config, rank, ranks)
    each = AXES.get(label).owns(config)[label]
    return range(units.start * each, units.stop * each)


def _holds(tensor: TensorId, layout: ParallelLayout, config: ModelConfig, place: Place) -> bool:
    """Whether this process scores a tensor: its stage's layers, dealt over data-parallel copies."""
    if tensor.layer is None:
        stage = 0 if tensor == EMBEDDING else layout.pipeline - 1
        return place.stage == stage and place.copy == 0
    return _holds_layer(tensor.layer, layout, config, place)


def _holds_layer(layer: int, layout: ParallelLayout, config: ModelConfig, place: Place) -> bool:
    return place.stage == layout.stage_of(layer, config.num_layers) and layer % place.copies == place.copy
