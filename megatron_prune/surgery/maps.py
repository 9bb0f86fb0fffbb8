"""One map per space: selecting units, rotating the stream and joining units are the same thing done to rows and columns."""

from __future__ import annotations

from dataclasses import dataclass
from math import prod
from typing import Mapping

import numpy as np
import torch
from torch import Tensor

from megatron_prune.arch.blocks.block import reads, spaces
from megatron_prune.files.region import Scratch


@dataclass(frozen=True, kw_only=True, eq=False)
class SpaceMap:
    """How a space becomes another: what writes into it is multiplied by ``write``, what reads it by ``read``.

    Attributes:
        write: float64 [new, old].
        read: float64 [old, new]; ``read.T @ write.T`` is the identity where nothing is lost that the new space can hold.
        elements: int64 [new], where all that the map does is to keep these; the matrices then say the same.
    """

    elements: Tensor | None = None
    matrices: tuple[Tensor, Tensor] | None = None
    size: int

    @classmethod
    def select(cls, elements: Tensor, size: int) -> SpaceMap:
        """Keep ``elements`` of ``size``, in their order."""
        return cls(elements=elements, size=size)

    @classmethod
    def linear(cls, write: Tensor, read: Tensor) -> SpaceMap:
        """Any linear map of the space."""
        return cls(matrices=(write, read), size=write.shape[1])

    @property
    def write(self) -> Tensor:
        return self._chosen() if self.matrices is None else self.matrices[0]

    @property
    def read(self) -> Tensor:
        return self._chosen().T if self.matrices is None else self.matrices[1]

    def _chosen(self) -> Tensor:
        chosen = torch.zeros(len(self.elements), self.size, dtype=torch.float64)
        chosen[range(len(self.elements)), self.elements] = 1.0
        return chosen

    def carry(self, data: Tensor, dim: int, *, reading: bool, scratch: Scratch) -> Tensor:
        """A tensor whose dimension ``dim`` is of the space, after the map; in memory of ``scratch`` where it selects."""
        if self.elements is not None:
            return _take(data, dim, self.elements, scratch)
        matrix = self.read.T if reading else self.write
        return torch.tensordot(matrix.to(data), data, dims=([1], [dim])).movedim(0, dim)


def carried(role: str, data: Tensor, maps: Mapping[str, SpaceMap], scratch: Scratch) -> Tensor:
    """A full role tensor after the maps of its spaces (those that have none stay as they are)."""
    for dim, space in enumerate(spaces(role)):
        if space in maps:
            data = maps[space].carry(data, dim, reading=reads(role, dim), scratch=scratch)
    return data


def _take(data: Tensor, dim: int, index: Tensor, scratch: Scratch) -> Tensor:
    """``data.index_select(dim, index)`` into kept memory. Columns go through numpy, which is three times as fast."""
    shape = (*data.shape[:dim], len(index), *data.shape[dim + 1 :])
    out = scratch.take(f"cut {dim}", prod(shape), data.dtype).view(shape)
    if dim == 0:
        return torch.index_select(data, 0, index, out=out)
    bits = {2: torch.int16, 4: torch.int32, 8: torch.int64}[data.dtype.itemsize]
    np.take(data.view(bits).numpy(), index.numpy(), axis=1, out=out.view(bits).numpy(), mode="clip")
    return out
