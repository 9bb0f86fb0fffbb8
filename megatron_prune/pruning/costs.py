"""Measuring what every block costs the model at every size (``planning/costs.py``), one block after another."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from math import isfinite
from pathlib import Path
from typing import Sequence

import torch
from torch import Tensor

from megatron_prune.arch.blocks.block import BLOCKS, BlockKind
from megatron_prune.arch.model import ModelConfig
from megatron_prune.arch.tensors import TensorId, tensor_shape
from megatron_prune.axes.axis import AXES
from megatron_prune.checkpoint.tensor_map import TensorMap
from megatron_prune.errors import InputError
from megatron_prune.importance.statistics import Statistics
from megatron_prune.planning.amounts import PROBED
from megatron_prune.planning.costs import Costs, Level, levels, sizes_at, whole
from megatron_prune.planning.costs_file import CostsManifest, has_costs, load_costs, save_costs
from megatron_prune.planning.make import make_plan
from megatron_prune.planning.selection import Scores
from megatron_prune.planning.target import Target
from megatron_prune.pruning.measure import Subject
from megatron_prune.runtime.reporting import log, progress_bar
from megatron_prune.runtime.world import World
from megatron_prune.surgery.probes import RIDGE, Probe, Probes, Writer, cut_writer
from megatron_prune.text.tokens import Calibration


def needed_moments(config: ModelConfig) -> frozenset[str]:
    """Sites whose second moments probes are fitted with."""
    return frozenset(BLOCKS.get(name).inside for name in config.blocks)


def probe_samples(calibration: Calibration) -> Calibration:
    """The samples that losses are measured on."""
    count = len(calibration.tokens)
    among = [count * (2 * place + 1) // (2 * min(PROBED, count)) for place in range(min(PROBED, count))]
    return Calibration(
        tokens=calibration.tokens[among],
        lengths=calibration.lengths[among],
        weights=calibration.weights[among],
        provenance=calibration.provenance,
    )


def measured_costs(
    subject: Subject,
    scores: Scores,
    metrics: dict[str, str],
    statistics: Statistics,
    calibration: Calibration,
    folder: Path,
    dtype: torch.dtype,
) -> Costs:
    """Measure what is not in ``folder`` yet; every process takes part, and all get the same.

    Args:
        scores: of the units of every axis that is chosen by layer: the best of them stay in a probe.
        metrics: axis → name of the metric that these are of.
        statistics: with the second moments of :func:`needed_moments`.

    Raises:
        InputError: if a loss is not finite.
    """
    world, config, samples = subject.world, subject.config, probe_samples(calibration)
    costs = world.all_gather(load_costs(folder, config) if world.is_main else None)[0]
    if world.all_gather(has_costs(folder))[0]:
        return costs
    stage = subject.engine.stage(config, dtype=dtype, seq_length=samples.tokens.shape[1])
    writers = _Writers(subject.tensors, scores, statistics, stage.device)
    run = _Run(config=config, costs=costs, folder=folder, world=world, writers=writers)
    total, left = run.count(), run.count(left=True)
    if world.is_main:
        size = f"{len(samples.tokens)} samples of {samples.tokens.shape[1]} tokens"
        log.info("costs of blocks: %d probes with %s%s", total, size, f", {total - left} done before" if left < total else "")
    with progress_bar("probing", left, shown=world.is_main, unit="probes") as advance:
        probes = Probes(subject.tensors, samples, stage, world, dtype=dtype, progress=advance)
        run.measure(probes, stage.copies)
    stage.close()
    manifest = CostsManifest(
        content_id=subject.model.identity,
        calibration=calibration.digest,
        samples=len(samples.tokens),
        metrics={axis: metrics[axis] for axis in {axis for name in config.blocks for axis in BLOCKS.get(name).axes}},
        ridge=RIDGE,
    )
    world.on_main(lambda: manifest.save(folder))
    return run.costs


@dataclass(kw_only=True)
class _Run:
    """Costs that are being measured, filed after every call of :class:`Probes`."""

    config: ModelConfig
    costs: Costs
    folder: Path
    world: World
    writers: _Writers

    def count(self, *, left: bool = False) -> int:
        """Losses to be measured, in all or still."""
        alone = sum(len(self.cuts(layer, kind)) for layer, kind in self.blocks() if not left or self.lacks(layer, kind))
        together = len(self.joint(left=left))
        return alone + together + (1 if not left or not isfinite(self.costs.dense) else 0)

    def measure(self, probes: Probes, copies: int) -> None:
        """Measure what is not there."""
        if not isfinite(self.costs.dense):
            (dense,) = _finite(probes.together([lambda layer, kind: None]))
            self.costs = dataclasses.replace(self.costs, dense=dense)
            self.save()
        for some in _groups([block for block in self.blocks() if self.lacks(*block)], copies):
            self.file_alone(some, [_finite(found) for found in probes.alone([self.probe(*block) for block in some])])
            self.save()
        for some in _groups(self.joint(left=True), copies):
            self.file_together(some, _finite(probes.together([self.at_level(*level) for level in some])))
            self.save()

    def save(self) -> None:
        """Write the file anew."""
        self.world.on_main(lambda: save_costs(self.folder, self.costs))

    # ------------------------------------------------------------------------------------------------ what there is to measure

    def blocks(self) -> list[tuple[int, BlockKind]]:
        return [(layer, kind) for layer in range(self.config.num_layers) for kind in self.config.of_layer(layer).kinds]

    def lacks(self, layer: int, kind: BlockKind) -> bool:
        """Whether a block's losses are not all there."""
        return not all(map(isfinite, self.costs.alone[kind.name][layer]))

    def cuts(self, layer: int, kind: BlockKind) -> list[dict[str, int]]:
        """The sizes that a block is measured at, each once; its own is the dense model's."""
        config, found = self.config.of_layer(layer), []
        for level in levels(kind):
            kept = sizes_at(level, kind, config)
            if kept not in (*found, whole(kind, config)):
                found.append(kept)
        return found

    def joint(self, *, left: bool) -> list[tuple[BlockKind, Level]]:
        """Levels that all layers are cut to together; of those that leave the same sizes one."""
        found: list[tuple[BlockKind, Level]] = []
        for kind in map(BLOCKS.get, self.config.blocks):
            known = [self.sizes(kind, None)]
            for number, level in enumerate(levels(kind)):
                wanted = not left or not isfinite(self.costs.together[kind.name][number])
                if wanted and (sizes := self.sizes(kind, level)) not in known:
                    known.append(sizes)
                    found.append((kind, level))
        return found

    def sizes(self, kind: BlockKind, level: Level | None) -> list[dict[str, int]]:
        """Those of all layers that have such a block, at a level or (``None``) whole."""
        of_layer = [self.config.of_layer(layer) for layer in range(self.config.num_layers)]
        there = [config for config in of_layer if kind in config.kinds]
        return [sizes_at(level, kind, config) if level else whole(kind, config) for config in there]

    def probe(self, layer: int, kind: BlockKind) -> Probe:
        return Probe(layer, kind, [lambda kept=kept: self.writers.writer(layer, kind, kept) for kept in self.cuts(layer, kind)])

    def at_level(self, changed: BlockKind, level: Level) -> Writer:
        """The writers of all layers' blocks of a kind at a level."""

        def writer(layer: int, kind: BlockKind) -> Tensor | None:
            config = self.config.of_layer(layer)
            kept = sizes_at(level, kind, config) if kind is changed else None
            return None if kept in (None, whole(kind, config)) else self.writers.writer(layer, kind, kept)

        return writer

    # ------------------------------------------------------------------------------------------------ what was measured

    def file_alone(self, blocks: Sequence[tuple[int, BlockKind]], losses: list[list[float]]) -> None:
        for (layer, kind), found in zip(blocks, losses):
            config, cuts = self.config.of_layer(layer), self.cuts(layer, kind)
            for number, level in enumerate(levels(kind)):
                kept = sizes_at(level, kind, config)
                loss = found[cuts.index(kept)] if kept in cuts else self.costs.dense
                self.costs.alone[kind.name][layer, number] = loss

    def file_together(self, measured: Sequence[tuple[BlockKind, Level]], losses: list[float]) -> None:
        for (kind, level), loss in zip(measured, losses):
            for number, other in enumerate(levels(kind)):
                if self.sizes(kind, other) == self.sizes(kind, level):
                    self.costs.together[kind.name][number] = loss


def _finite(losses: list[float]) -> list[float]:
    """Losses as they are.

    Raises:
        InputError: if one is not finite.
    """
    if not all(map(isfinite, losses)):
        raise InputError(
            "a loss of the model on this text is not finite (NaN or infinity)",
            do="look for broken weights with megatron-prune inspect --weights, or compute with --dtype fp32",
        )
    return losses


def _groups(items: Sequence, size: int) -> list[Sequence]:
    return [items[start : start + size] for start in range(0, len(items), size)]


@dataclass
class _Writers:
    """Writers of cut blocks, by the scores' order and the second moments."""

    tensors: TensorMap
    scores: Scores
    statistics: Statistics
    device: torch.device
    _moment: tuple[tuple[int, str] | None, Tensor | None] = field(default=(None, None), repr=False)

    def writer(self, layer: int, kind: BlockKind, kept: dict[str, int]) -> Tensor:
        """The writer of a layer's block where ``kept`` units stay along its axes: float64 [hidden, inside], zero for the others."""
        config = self.tensors.config.of_layer(layer)
        shape = tensor_shape(kind.writer, config)
        if not any(kept.values()):
            return torch.zeros(shape, dtype=torch.float64)
        if self._moment[0] != (layer, kind.name):
            self._moment = (layer, kind.name), self.statistics.moment(kind.writer, layer).to(self.device)
        weight = self.tensors.read_block(TensorId(kind.writer, layer), *map(range, shape))
        return cut_writer(weight, self._moment[1], self._elements(layer, kind, kept).to(self.device))

    def _elements(self, layer: int, kind: BlockKind, kept: dict[str, int]) -> Tensor:
        """What stays inside the block, as a plan with that cut alone chooses it."""
        config, axis = self.tensors.config, kind.axes[0]
        target = Target(config=config, drop_layers=(), by_layer={(axis, layer): units for axis, units in kept.items()})
        plan = make_plan(config, target, self.scores, prune_type="global", ranks=1, made_by={}, content_id=None)
        units = next(entry for entry in plan.layers if entry.layer == layer).units(axis)
        each = AXES.get(axis).owns(config.of_layer(layer))[kind.inside_space]
        return (torch.tensor(units)[:, None] * each + torch.arange(each)).flatten()
