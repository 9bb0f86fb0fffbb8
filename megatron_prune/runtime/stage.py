"""One decoder layer at a time: what measuring and re-fitting ask of the place where layers run.

All of a run's samples go through a layer before the next one is read, so that a model never has to be in memory as a
whole. ``runtime/megatron_stage.py`` runs megatron-core's layers under TP, ``runtime/huggingface_stage.py`` those of
transformers in one process; what is written against the two protocols here runs on either.
"""

from __future__ import annotations

from typing import Callable, Protocol

import torch
from torch import Tensor, nn

from megatron_prune.arch.model import ModelConfig

Read = Callable[[str, range, range], Tensor]
"""(role, rows, columns) → that block of a layer's role tensor."""


def reader(weights: dict[str, Tensor]) -> Read:
    """Blocks of full role tensors in memory."""

    def read(role: str, rows: range, cols: range) -> Tensor:
        matrix = weights[role].reshape(weights[role].shape[0], -1)
        return matrix[rows.start : rows.stop, cols.start : cols.stop]

    return read


class OpenLayer(Protocol):
    """A decoder layer opened at the input of each matrix. Streams are [samples, tokens, hidden], full on every rank;
    what lies between two matrices of a block is this rank's part ([samples, tokens, local])."""

    def norm_attention(self, stream: Tensor) -> Tensor:
        """Input of q, k and v: the normalised stream times the norm's weight."""

    def context(self, normed: Tensor) -> Tensor:
        """Input of ``o``: this rank's heads × head_dim."""

    def write_attention(self, context: Tensor) -> Tensor:
        """What attention adds to the stream, summed over ranks."""

    def norm_mlp(self, stream: Tensor) -> Tensor:
        """Input of gate and up."""

    def channels(self, normed: Tensor) -> Tensor:
        """Input of ``down``: this rank's silu(gate) × up."""

    def write_mlp(self, channels: Tensor) -> Tensor:
        """What the feed-forward block adds to the stream, summed over ranks."""

    def load(self, read: Read, roles: set[str] | None = None) -> None:
        """Fill from role tensors, all or those of ``roles`` (fused ones, q k v and gate up, go together)."""

    def matrices(self, roles: set[str]) -> dict[tuple[str, ...], nn.Parameter]:
        """This rank's part of the matrices of ``roles``: the roles fused in each → the parameter, which needs no gradient
        until it is told to."""

    def full(self, roles: set[str]) -> dict[str, Tensor]:
        """Those matrices as they are now, whole role tensors on the host, the same on every rank."""


class Stage(Protocol):
    """Where layers run: this process's place among those that share a layer, and those that share the samples."""

    device: torch.device
    rank: int
    ranks: int
    copy: int
    copies: int

    def layer(self, config: ModelConfig) -> OpenLayer:
        """A layer of a model of that shape, still empty."""

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
