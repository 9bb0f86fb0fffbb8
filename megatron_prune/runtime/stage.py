"""One decoder layer at a time: what measuring and re-fitting ask of the place where layers run.

All of a run's samples go through a layer before the next one is read, so that a model never has to be in memory as a
whole. ``runtime/megatron_stage.py`` runs megatron-core's layers under TP, ``runtime/huggingface_stage.py`` those of
transformers in one process; what is written against the two protocols here runs on either.
"""

from __future__ import annotations

from typing import Callable, Protocol

import torch
from torch import Tensor, nn

from megatron_prune.arch.blocks.block import BlockKind
from megatron_prune.arch.model import ModelConfig

Read = Callable[[str, range, range], Tensor]
"""(role, rows, columns) → that block of a layer's role tensor."""


def reader(weights: dict[str, Tensor]) -> Read:
    """Blocks of full role tensors in memory."""

    def read(role: str, rows: range, cols: range) -> Tensor:
        matrix = weights[role].reshape(weights[role].shape[0], -1)
        return matrix[rows.start : rows.stop, cols.start : cols.stop]

    return read


class OpenBlock(Protocol):
    """A block opened before and after its writer. Streams are [samples, tokens, hidden], full on every rank; what is inside is
    this rank's part ([samples, tokens, local])."""

    kind: BlockKind

    def norm(self, stream: Tensor) -> Tensor:
        """Input of the readers: the normalised stream times the norm's weight."""

    def inside(self, normed: Tensor) -> Tensor:
        """Input of the writer."""

    def write(self, inside: Tensor) -> Tensor:
        """The writer's output, summed over ranks."""

    def after(self, written: Tensor) -> Tensor:
        """What is added to the stream: that output, through the norm after it where there is one."""


class OpenLayer(Protocol):
    """A decoder layer, opened block by block."""

    blocks: tuple[OpenBlock, ...]

    def load(self, read: Read, roles: set[str] | None = None) -> None:
        """Fill from role tensors, all or those of ``roles`` (what Megatron fuses goes together)."""

    def matrices(self, roles: set[str]) -> dict[tuple[str, ...], nn.Parameter]:
        """This rank's part of the matrices of ``roles``: the roles fused in each → the parameter, which needs no gradient
        until it is told to."""

    def full(self, roles: set[str]) -> dict[str, Tensor]:
        """Those matrices as they are now, whole role tensors on the host, the same on every rank."""


def added(block: OpenBlock, stream: Tensor) -> Tensor:
    """What a block adds to the stream."""
    return block.after(block.write(block.inside(block.norm(stream))))


def through(layers: list[OpenLayer], stream: Tensor) -> Tensor:
    """The stream after all of ``layers``."""
    for layer in layers:
        for block in layer.blocks:
            stream = stream + added(block, stream)
    return stream


class Layers:
    """One open layer after another, built anew only where the next is of another shape; at most ``together`` at a time.

    Args:
        config: of the model.
    """

    def __init__(self, stage: Stage, config: ModelConfig, together: int = 1):
        self._stage, self._config = stage, config
        self._open: list[tuple[ModelConfig, OpenLayer] | None] = [None] * together

    def at(self, layer: int, place: int = 0) -> OpenLayer:
        """A layer, its weights still those of the one before it in this ``place``."""
        wanted = self._config.of_layer(layer)
        if self._open[place] is None or self._open[place][0] != wanted:
            self._open[place] = wanted, self._stage.layer(wanted)
        return self._open[place][1]


class Stage(Protocol):
    """Where layers run: this process's place among those that share a layer, and those that share the samples."""

    device: torch.device
    rank: int
    ranks: int
    copy: int
    copies: int

    def layer(self, config: ModelConfig) -> OpenLayer:
        """A layer, still empty.

        Args:
            config: of the layer (:meth:`ModelConfig.of_layer`).
        """

    def gather(self, local: Tensor) -> Tensor:
        """Join the last dimension of every rank's part."""

    def gather_rows(self, local: Tensor, extent: int) -> Tensor | None:
        """Join the first dimension, ``extent`` in all, of every rank's :meth:`share`: on the host of the first process, ``None``
        on all others."""

    def share(self, extent: int) -> range:
        """This rank's equal share of something that all ranks hold."""

    def sum_copies(self, value: Tensor) -> Tensor:
        """Sum over the copies, which hold different samples."""

    def agreed(self, value: float) -> float:
        """The first process's number: what is decided by it is decided alike everywhere."""

    def spread(self, value: Tensor) -> Tensor:
        """The first process's ``value`` on the host, written into those of all others, which have its shape."""

    def close(self) -> None:
        """Give up what the stage holds."""
