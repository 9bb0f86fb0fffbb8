"""Uniformly random scores: the selection of LLama-Pruner (S4), seeded.

A draw depends on the seed, the axis and the layer alone, so it is the same on every rank and at every TP × PP.
"""

from __future__ import annotations

import hashlib

import torch
from torch import Tensor

from megatron_prune.importance.metric import METRICS, Metric


@METRICS.register("random")
class Random(Metric):
    """Independent uniform numbers."""

    def finish(self, axis: str, layer: int | None, total: Tensor) -> Tensor:
        name = hashlib.sha256(f"{self.seed} {axis} {layer}".encode()).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(name[:8], "little") >> 1)
        return torch.rand(total.numel(), dtype=torch.float64, generator=generator)
