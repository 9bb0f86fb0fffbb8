"""Which blocks stay, which are fitted together, and the dense model's walk from one to the next."""

from __future__ import annotations

from typing import NamedTuple

from megatron_prune.arch.blocks.block import BlockKind
from megatron_prune.arch.model import ModelConfig
from megatron_prune.checkpoint.tensor_map import TensorMap
from megatron_prune.importance.walk import Walk
from megatron_prune.planning.amounts import AFTER
from megatron_prune.runtime.stage import OpenBlock, OpenLayer


class KeptBlock(NamedTuple):
    """A block that stays: in layer ``number`` of the pruned model; ``start`` is its place among the blocks of the dense one, and
    ``end`` that of the next block that stays."""

    number: int
    kind: BlockKind
    start: int
    end: int

    @property
    def folds(self) -> bool:
        """Whether blocks after it are cut."""
        return self.end > self.start + 1


def kept_blocks(places: list[tuple[int, BlockKind]], kept: list[int], config: ModelConfig) -> list[KeptBlock]:
    """The blocks that stay.

    Args:
        places: (layer, kind) of every block of the dense model.
        kept: its layers that stay, ascending.
        config: of the pruned model.
    """
    of_new = [(number, kind) for number in range(len(kept)) for kind in config.of_layer(number).kinds]
    starts = [places.index((kept[number], kind)) for number, kind in of_new]
    ends = [*starts[1:], len(places)]
    return [KeptBlock(number, kind, start, end) for (number, kind), start, end in zip(of_new, starts, ends)]


def windows_of(kept: list[int], layers: int) -> list[range]:
    """New layers that are fitted together: one each, or the one before cut layers and ``AFTER`` that follow.

    Args:
        kept: layers that stay, ascending.
        layers: of the dense model.
    """
    ends, windows = [*kept[1:], layers], []
    while not windows or windows[-1].stop < len(kept):
        start = windows[-1].stop if windows else 0
        length = 1 if ends[start] == kept[start] + 1 else 1 + AFTER
        windows.append(range(start, min(start + length, len(kept))))
    return windows


class DenseWalk(Walk):
    """The dense model's walk, block by block.

    Attributes:
        places: (layer, kind) of every block, in order.
        place: the block that the stream is before.
    """

    def __init__(self, tensors: TensorMap, *given, **named):
        super().__init__(tensors, *given, **named)
        config = tensors.config
        self.places = [(layer, kind) for layer in range(config.num_layers) for kind in config.of_layer(layer).kinds]
        self.place = 0
        self._opened: tuple[int, OpenLayer] | None = None

    def block(self) -> OpenBlock:
        """The block that the stream is before, with its weights."""
        layer, kind = self.places[self.place]
        if self._opened is None or self._opened[0] != layer:
            self._opened = layer, self.opened(layer)
        return next(block for block in self._opened[1].blocks if block.kind is kind)

    def advance(self, end: int) -> None:
        """Take the stream through blocks until it is before block ``end``.

        Raises:
            InputError: naming a layer whose output is not finite.
        """
        while self.place < end:
            self.take([self.block()])
            layer = self.places[self.place][0]
            self.place += 1
            if self.place == len(self.places) or self.places[self.place][0] != layer:
                self.check(f"layer {layer}")
