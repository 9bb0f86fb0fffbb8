"""Fitting one block that stays, matrix by matrix, to what the dense model does from its input to the next block that stays.

1. The readers (where the stream was cut): from the pruned norm's output to what the dense ones made of theirs.
2. The writer: from what is inside the pruned block to what brings the pruned stream to where the dense one is.

A norm after the writer gives ``g ⊙ u / rms(u)`` of the writer's output u, whatever its length. So the writer is fitted to the
direction ``t / g`` of what is to be added, t, in the length that the dense writer's output has there, tokens weighted by the
inverse square of it; then one number for the whole block sets the length of what is added.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Callable

import torch
from torch import Tensor

from megatron_prune.arch.model import ModelConfig
from megatron_prune.importance.moments import Moment
from megatron_prune.importance.walk import Walk
from megatron_prune.runtime.stage import OpenBlock
from megatron_prune.surgery.basis import Basis
from megatron_prune.surgery.least_squares import fitted, scale

Folds = list[tuple[Tensor, Tensor]]
"""Of every fold of the samples, A and T (``least_squares.py``), float64."""
SMALLEST_GAIN = 1e-3
"""Channels that a norm after a block lets through with less than this share of its root mean square are as good as closed."""


@dataclass(frozen=True, kw_only=True)
class Fit:
    """How to fit.

    Attributes:
        sequential: the pruned stream is what the pruned layers before left; else the dense one.
        writers: ridge of writers (``o``, ``down``) towards the cut matrices, as a share of the moment's mean diagonal.
        readers: the same for what reads the stream, where the stream is cut.
        passes: over the text in which all matrices of a cut block are fitted together (``reconstruct.py``); 0 for none.
    """

    sequential: bool = False
    writers: float | None = None
    readers: float | None = None
    passes: int = 4


class BlockFit:
    """The least-squares fits of a run.

    Args:
        walk: the dense model's.
        config: the dense model's.
        new: the pruned model's.
        basis: of the pruned stream.
    """

    def __init__(self, walk: Walk, config: ModelConfig, new: ModelConfig, basis: Basis, fit: Fit):
        self._walk, self._old, self._new, self._basis, self._fit = walk, config, new, basis, fit
        self.folds = folds_of(walk.count)

    def readers(
        self, norm: Tensor, whole: dict[str, Tensor], dense: OpenBlock, new: OpenBlock, pruned: Tensor
    ) -> dict[str, Tensor]:
        """What reads the stream of a block, fitted; float64 by role.

        Args:
            norm: weight of the dense norm.
            whole: the readers' kept rows, the stream uncut, float64.
            pruned: the pruned stream, [samples, tokens, width].
        """
        folds = self.norm_moments(dense.norm, new.norm, pruned)
        reading = self._basis.reading(norm + self._old.norm_offset)
        through = self.solved(reading.shape, lambda: self.through(folds, reading))
        return {role: matrix @ through for role, matrix in whole.items()}

    def norm_moments(self, dense: Callable[[Tensor], Tensor], new: Callable[[Tensor], Tensor], pruned: Tensor) -> Folds | None:
        """Second moment of the pruned norm's output, [width, width], and of the dense one's with it; on the first process."""
        walk = self._walk
        sums = _FoldMoments(walk, self.folds, pruned.shape[-1], walk.stream.shape[-1])
        for batch in walk.batches():
            seen = new(walk.on_device(pruned[batch]))
            sums.add(batch, seen, dense(walk.on_device(walk.stream[batch])), walk.weights[batch])
        return sums.finish()

    def through(self, folds: Folds, reading: Tensor) -> Tensor:
        """The map from a pruned norm's output to the dense one's that ``reading`` is a start for, float64."""
        return fitted(folds, scale(folds, reading) * reading, self._fit.readers, self._walk.stage.device)[0]

    def writer(self, weight: Tensor, inside: list[Tensor], pruned: Tensor) -> Tensor:
        """The writer fitted to bring the pruned stream to where the dense one is now, float64.

        Args:
            weight: the cut writer.
            inside: what it reads, by batch, this rank's part.
        """
        targets = (self.wanted(batch, pruned) for batch in self._walk.batches())
        weights = (self._walk.even(batch) for batch in self._walk.batches())
        return self._written(weight, inside, zip(targets, weights))

    def writer_before_norm(
        self, weight: Tensor, inside: list[Tensor], lengths: list[Tensor], gain: Tensor, pruned: Tensor
    ) -> Tensor:
        """The same of a writer with a norm after it.

        Args:
            lengths: root mean squares of the dense writer's output, by batch, float64 [samples, tokens].
            gain: the factors of the pruned norm, float64 [width].
        """
        gain = self._walk.on_device(gain)
        least = SMALLEST_GAIN * gain.square().mean().sqrt()
        open_gain = torch.where(gain.abs() < least, least, gain)

        def directions():
            for batch, length in zip(self._walk.batches(), map(self._walk.on_device, lengths)):
                direction = self.wanted(batch, pruned).double() / open_gain
                direction *= (length / direction.square().mean(dim=-1).sqrt().clamp(min=1e-30))[..., None]
                yield direction.float(), (self._walk.even(batch) / length.square().clamp(min=1e-30)).float()

        return self._written(weight, inside, directions())

    def _written(self, weight: Tensor, inside: list[Tensor], aims) -> Tensor:
        walk = self._walk
        sums = _FoldMoments(walk, self.folds, weight.shape[1], weight.shape[0])
        for batch, value, (wanted, weights) in zip(walk.batches(), inside, aims):
            sums.add(batch, walk.stage.gather(walk.on_device(value)), wanted, weights)
        folds = sums.finish()
        return self.solved(weight.shape, lambda: fitted(folds, weight, self._fit.writers, walk.stage.device)[0])

    def length(self, added: list[Tensor], pruned: Tensor) -> float:
        """The number that what a block adds is to be multiplied by, to add what is wanted best.

        Args:
            added: by batch, [samples, tokens, width].
        """
        walk, sums = self._walk, torch.zeros(2, dtype=torch.float64, device=self._walk.stage.device)
        for batch, value in zip(walk.batches(), added):
            value, weights = walk.on_device(value).float(), walk.even(batch)[..., None]
            wanted = self.wanted(batch, pruned).float()
            sums += torch.stack([(weights * value * wanted).sum(), (weights * value * value).sum()]).double()
        along, energy = walk.stage.sum_copies(sums).tolist()
        return walk.stage.agreed(along / energy if energy > 0 and along > 0 else 1.0)

    def wanted(self, batch: slice | Tensor, pruned: Tensor) -> Tensor:
        """What is to be added to the pruned stream, [samples, tokens, width]."""
        walk = self._walk
        return self._basis.encoded(walk.on_device(walk.stream[batch])) - walk.on_device(pruned[batch])

    def solved(self, shape: tuple[int, ...], solve: Callable[[], Tensor]) -> Tensor:
        """What the first process solves, the same on every one: float64."""
        found = solve().cpu() if self._walk.world.is_main else torch.empty(shape, dtype=torch.float64)
        return self._walk.stage.spread(found.contiguous())


def folds_of(count: int) -> Tensor:
    """Which of two folds each sample is in, int64 [samples]: every other one, so that both have the same mixture."""
    return torch.arange(count) % 2


class _FoldMoments:
    """Second moments of x and of (t, x), for every fold of the samples."""

    def __init__(self, walk: Walk, folds: Tensor, features: int, targets: int):
        self._walk, self._features, self._folds = walk, features, folds[walk.numbers]
        self._sums = [Moment(walk.stage, features, targets) for _ in range(int(folds.max()) + 1)]

    def add(self, batch: slice, value: Tensor, wanted: Tensor, weight: Tensor) -> None:
        weight = self._walk.on_device(weight)
        for fold, sums in enumerate(self._sums):
            mine = (self._folds[batch] == fold).to(value.device)
            if mine.all():
                sums.add(value, weight, wanted)
            elif mine.any():
                sums.add(value[mine], weight[mine], wanted[mine])

    def finish(self) -> Folds | None:
        whole = [sums.whole() for sums in self._sums]
        if whole[0] is None:
            return None
        return [(part[:, : self._features], part[:, self._features :].T) for part in whole]
