"""A run's samples on their way through the layers of a model: one layer in memory at a time.

All samples of this process go through a layer before the next is read (``runtime/stage.py``). Whoever looks on sees what
passes inside the blocks; measuring, re-fitting and folding are all such walks.
"""

from __future__ import annotations

from typing import Callable, Iterable, Iterator, Protocol

import torch
from torch import Tensor

from megatron_prune.arch.tensors import TensorId
from megatron_prune.checkpoint.tensor_map import TensorMap
from megatron_prune.errors import InputError
from megatron_prune.planning.amounts import BATCH_TOKENS
from megatron_prune.runtime.ends import embed
from megatron_prune.runtime.stage import Layers, OpenBlock, OpenLayer, Read, Stage
from megatron_prune.runtime.world import World
from megatron_prune.text.tokens import Calibration


class Onlooker(Protocol):
    """Who looks on while a batch goes through a block. Tensors are [samples, tokens, …] on the stage's device."""

    def see(self, block: OpenBlock, stream: Tensor, normed: Tensor, inside: Tensor, after: Tensor, batch: slice) -> None:
        """What enters a block, what its norm gives, what is inside, and the stream after it."""


class Walk:
    """This process's samples before some layer of a model.

    Attributes:
        stream: [samples, tokens, hidden] on the host, in the computing dtype: what enters the next layer.
        weights: float32 [samples, tokens]; 0 where a sample has ended.
        sample_weights: float64 [samples].
        tokens: int64 [samples, tokens].
        lengths: int64 [samples].
        numbers: int64 [samples], their places in the whole calibration.
        count: samples of the whole calibration.

    Args:
        progress: called with the number of tokens that went through a layer.
        among: numbers of the samples that are taken along, int64; ``None`` for all.
    """

    def __init__(
        self,
        tensors: TensorMap,
        calibration: Calibration,
        stage: Stage,
        world: World,
        *,
        dtype: torch.dtype = torch.float32,
        progress: Callable[[int], None] = lambda tokens: None,
        among: Tensor | None = None,
    ):
        self.count = len(calibration.tokens)
        self.numbers = torch.arange(self.count)[stage.copy :: stage.copies]
        if among is not None:
            self.numbers = self.numbers[torch.isin(self.numbers, among)]
        self.tokens, self.lengths = calibration.tokens[self.numbers], calibration.lengths[self.numbers]
        self.sample_weights = calibration.weights[self.numbers]
        inside = torch.arange(self.tokens.shape[1])[None] < self.lengths[:, None]
        self.weights = (inside * self.sample_weights[:, None]).float()
        self.stream = embed(tensors, self.tokens, dtype)
        self.stage, self.world, self.progress = stage, world, progress
        self._tensors, self._layers = tensors, Layers(stage, tensors.config)

    def batches(self) -> Iterator[slice]:
        """Groups of samples that go through a layer together."""
        each = max(1, BATCH_TOKENS // self.weights.shape[1])
        return (slice(start, start + each) for start in range(0, len(self.weights), each))

    def on_device(self, value: Tensor) -> Tensor:
        """A part of the samples where the stage computes."""
        return value.to(self.stage.device)

    def even(self, batch: slice | Tensor) -> Tensor:
        """Weights of tokens that make them count alike, whatever the size of the stream where they are now."""
        return self.evened(self.on_device(self.weights[batch]), self.on_device(self.stream[batch]))

    def evened(self, weights: Tensor, stream: Tensor) -> Tensor:
        """Weights [...] of tokens over the mean square of a stream [..., hidden], at least the epsilon of a norm: what is smaller
        a norm does not make larger either, and an embedding's row may be all zeros."""
        return weights / stream.float().square().mean(dim=-1).clamp(min=self._tensors.config.norm_epsilon)

    def opened(self, layer: int) -> OpenLayer:
        """A layer with its weights."""
        self._open = self._layers.at(layer)
        self._open.load(layer_reader(self._tensors, layer))
        return self._open

    def take(self, blocks: Iterable[OpenBlock], onlooker: Onlooker | None = None) -> None:
        """Take the samples through some blocks of the opened layer."""
        blocks = tuple(blocks)
        leaves = not blocks or blocks[-1] is self._open.blocks[-1]
        for batch in self.batches():
            stream = self.on_device(self.stream[batch])
            for block in blocks:
                normed = block.norm(stream)
                inside = block.inside(normed)
                after = stream + block.after(block.write(inside))
                if onlooker is not None:
                    onlooker.see(block, stream, normed, inside, after, batch)
                stream = after
            self.stream[batch] = stream.to(self.stream)
            if leaves:
                self.progress(self.weights[batch].numel())

    def check(self, where: str) -> None:
        """Refuse a stream that is not finite, on every process alike.

        Raises:
            InputError: saying of what it is the output.
        """
        check_finite(self.stream, where, self.world)

    def to_the_end(self, first: int = 0) -> None:
        """Through all layers from ``first`` on.

        Raises:
            InputError: naming a layer whose output is not finite.
        """
        for layer in range(first, self._tensors.config.num_layers):
            self.take(self.opened(layer).blocks)
            self.check(f"layer {layer}")


def layer_reader(tensors: TensorMap, layer: int) -> Read:
    """Blocks of a stored layer's role tensors."""
    return lambda role, rows, cols: tensors.read_block(TensorId(role, layer), rows, cols)


def check_finite(stream: Tensor, where: str, world: World) -> None:
    """Refuse a stream with NaN or infinity, on every process alike.

    Raises:
        InputError: naming the layer.
    """
    if not all(world.all_gather(is_finite(stream))):
        raise InputError(
            f"the output of {where} is not finite (NaN or infinity) on this text",
            do="look for broken weights with megatron-prune inspect --weights, or compute with --dtype fp32",
        )


def is_finite(values: Tensor) -> bool:
    """Whether no value is NaN or infinite: a sum tells, unless it overflows by itself."""
    return bool(values.sum(dtype=torch.float32).isfinite()) or bool(values.isfinite().all())
