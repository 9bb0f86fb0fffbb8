"""Probes: the loss of the whole model with one block cut and fitted, measured.

A block of the dense model is cut by giving it another writer: zero in the columns of units that go, the others by least squares,
so that what it adds to the dense stream stays as it was as nearly as it can. Its readers need no change, so that all sizes of a
block share what is inside it, and from there on a model with each goes on beside the others, to the end.

Data-parallel copies hold the same samples and probe different blocks. They go through the layers in step, since layers are
read by all processes together.
"""

from __future__ import annotations

from typing import Callable, NamedTuple, Sequence

import torch
from torch import Tensor

from megatron_prune.arch.blocks.block import BlockKind
from megatron_prune.checkpoint.tensor_map import TensorMap
from megatron_prune.importance.text_loss import next_token_losses
from megatron_prune.importance.walk import layer_reader
from megatron_prune.planning.amounts import BATCH_TOKENS
from megatron_prune.runtime.ends import embed
from megatron_prune.runtime.stage import Layers, OpenBlock, OpenLayer, Stage, added
from megatron_prune.runtime.world import World
from megatron_prune.surgery.least_squares import ridge
from megatron_prune.text.tokens import Calibration

RIDGE = 0.01
"""How strongly probed writers are held to the cut matrices, as a share of the moment's mean diagonal."""

Writer = Callable[[int, BlockKind], Tensor | None]
"""(layer, kind of block) → its whole writer, [hidden, inside]; ``None`` for the model's own."""


class Probe(NamedTuple):
    """A block in a layer, with each of several writers."""

    layer: int
    kind: BlockKind
    writers: Sequence[Callable[[], Tensor]]


def cut_writer(weight: Tensor, moment: Tensor, elements: Tensor, strength: float = RIDGE) -> Tensor:
    """The writer that, reading some of what is inside a block, comes nearest to what the whole one gives; zero elsewhere.

    Args:
        weight: [hidden, inside].
        moment: second moment of what is inside, float64 [inside, inside].
        elements: those that stay, int64.

    Returns:
        float64 [hidden, inside].
    """
    weight = weight.to(moment)
    found = torch.zeros_like(weight)
    if len(elements):
        kept = moment[elements]
        found[:, elements] = ridge(kept[:, elements], weight @ kept.T, weight[:, elements], strength)
    return found


class Probes:
    """Probing of a model; every process takes part in every call.

    Args:
        samples: that losses are measured on.
        progress: called with the number of writers that were measured.
    """

    def __init__(
        self,
        tensors: TensorMap,
        samples: Calibration,
        stage: Stage,
        world: World,
        *,
        dtype: torch.dtype = torch.float32,
        progress: Callable[[int], None] = lambda count: None,
    ):
        self._tensors, self._stage, self._world, self._progress = tensors, stage, world, progress
        self._tokens, self._layers = samples.tokens, Layers(stage, tensors.config)
        inside = torch.arange(samples.tokens.shape[1])[None] < samples.lengths[:, None]
        self._weights = (inside * samples.weights[:, None]).float()
        self._start = embed(tensors, samples.tokens, dtype)
        self._dense, self._at = self._start, 0
        self._losses = next_token_losses(tensors, stage.device)

    def alone(self, probes: Sequence[Probe]) -> list[list[float]]:
        """The losses of the model with each writer of a block in it alone, for at most one block for every copy.

        Args:
            probes: by layer, and from call to call.

        Returns:
            By block and writer, in nats; the same on every process.
        """
        while self._at < probes[0].layer:
            self._dense = self._through(self._opened(self._at).blocks, self._dense)
            self._at += 1
        mine = probes[self._stage.copy] if self._stage.copy < len(probes) else None
        dense, changed = self._dense, []
        for number in range(self._at, self._tensors.config.num_layers):
            layer = self._opened(number)
            if mine is None:
                continue
            if number < mine.layer:
                dense = self._through(layer.blocks, dense)
            elif number == mine.layer:
                changed = self._changed(layer, mine, dense)
            else:
                changed = [self._through(layer.blocks, stream) for stream in changed]
        found = self._of_copies([self._loss(stream) for stream in changed])
        self._progress(sum(len(probe.writers) for probe in probes))
        return found[: len(probes)]

    def together(self, writers: Sequence[Writer]) -> list[float]:
        """The losses of the model with many writers exchanged at once, for at most one such model for every copy."""
        mine = writers[self._stage.copy] if self._stage.copy < len(writers) else None
        stream = self._start
        for number in range(self._tensors.config.num_layers):
            layer = self._opened(number)
            if mine is None:
                continue
            for block in layer.blocks:
                if (writer := mine(number, block.kind)) is not None:
                    self._exchange(layer, block, writer)
            stream = self._through(layer.blocks, stream)
        found = self._of_copies([] if mine is None else [self._loss(stream)])
        self._progress(len(writers))
        return [losses[0] for losses in found[: len(writers)]]

    def _opened(self, number: int) -> OpenLayer:
        layer = self._layers.at(number)
        layer.load(layer_reader(self._tensors, number))
        return layer

    def _changed(self, layer: OpenLayer, probe: Probe, stream: Tensor) -> list[Tensor]:
        """The stream after a layer, with each writer in the block."""
        place = next(place for place, block in enumerate(layer.blocks) if block.kind is probe.kind)
        before, block, after = layer.blocks[:place], layer.blocks[place], layer.blocks[place + 1 :]
        stream = self._through(before, stream)
        inside = self._mapped(lambda x: block.inside(block.norm(x)), stream)
        found = []
        for writer in probe.writers:
            self._exchange(layer, block, writer())
            adds = self._mapped(lambda x: block.after(block.write(x)), inside)
            found.append(self._through(after, stream + adds))
        return found

    def _exchange(self, layer: OpenLayer, block: OpenBlock, writer: Tensor) -> None:
        """Put a whole writer in place of a block's own, this rank's columns of it."""
        mine = self._stage.share(writer.shape[1])
        for parameter in layer.matrices({block.kind.writer}).values():
            parameter.data.copy_(writer[:, mine.start : mine.stop])

    def _through(self, blocks: Sequence[OpenBlock], stream: Tensor) -> Tensor:
        """The stream after some blocks."""

        def after(part: Tensor) -> Tensor:
            for block in blocks:
                part = part + added(block, part)
            return part

        return self._mapped(after, stream) if blocks else stream

    def _mapped(self, function: Callable[[Tensor], Tensor], values: Tensor) -> Tensor:
        """A function of samples, a few at a time where the stage computes; values stay on the host."""
        each = max(1, BATCH_TOKENS // values.shape[1])
        return torch.cat([function(part.to(self._stage.device)).cpu() for part in values.split(each)])

    def _loss(self, stream: Tensor) -> float:
        device, sums = self._stage.device, torch.zeros(2, dtype=torch.float64)
        for place, weights in enumerate(self._weights):
            losses = self._losses(stream[place].to(device), self._tokens[place].to(device)).cpu()
            sums += torch.stack([(losses * weights[1:]).sum(), weights[1:].sum()]).double()
        return (sums[0] / sums[1]).item()

    def _of_copies(self, losses: list[float]) -> list[list[float]]:
        """What the first rank of every copy found, by copy."""
        found = self._world.all_gather((self._stage.copy, self._stage.rank, losses))
        return [mine for copy, rank, mine in sorted(found) if rank == 0]
