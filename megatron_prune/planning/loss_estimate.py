"""What a shape is expected to cost in quality, from a metric's own scores."""

from __future__ import annotations

from functools import cache
from math import inf, log
from typing import Callable

import torch

from megatron_prune.arch.model import ModelConfig
from megatron_prune.axes.axis import AXES
from megatron_prune.errors import InputError
from megatron_prune.planning.loss_weights import LOSS_WEIGHTS, cut_axes, units_each
from megatron_prune.planning.selection import Scores


def loss_estimate(config: ModelConfig, scores: Scores, *, even: float = 0.0) -> Callable[[ModelConfig], float]:
    """A function that tells what a shape costs by the metric's own scores, to compare shapes of one model.

    Σ over cut axes of ``LOSS_WEIGHTS[axis] · −log(share of the summed score that stays)``. The share of an axis chosen layer
    by layer is the mean over **all** layers (those that go too, so that dropping one never hides what it lost), each layer
    normalised to one; of query heads, over all KV groups as well. The best units stay, wherever ranks hold them: the
    estimate is the same at every TP and prune type. Negative scores count as zero; of units that are all zero, each counts
    the same. Cutting more never lowers it.

    Args:
        scores: of every axis that is cut, all layers (``("hidden", None)``, ``("ffn", 0…)``, …); sorted once.
        even: weight of even scores mixed in, 0 to 1. At 1 sizes alone decide, by the measured weights. More than 0 guards
            against scores so skewed (channels of massive activation) that a cut looks free.

    Raises:
        InputError: (the function) if scores are missing, of another size, or not finite.
    """
    curve = cache(lambda axis: _kept_shares(scores, axis, config))

    def loss(target: ModelConfig) -> float:
        total = 0.0
        for axis in cut_axes(config, target):
            keep, shares = units_each(target, axis), curve(axis)
            stays = min(1.0, (1 - even) * shares[keep - 1] + even * keep / len(shares))
            total += LOSS_WEIGHTS[axis] * -log(stays) if stays > 0 else inf
        return total

    return loss


def _kept_shares(scores: Scores, axis: str, config: ModelConfig) -> list[float]:
    """Share of the score that the best 1, 2, … units hold: the mean over layers (and KV groups), each normalised."""
    layers = range(config.num_layers) if AXES.get(axis).per_layer else [None]
    rows = torch.cat([_rows(scores, axis, layer, config) for layer in layers])
    largest = rows.amax(1, keepdim=True)
    rows = torch.where(largest > 0, rows / largest, torch.ones_like(rows)).sort(1, descending=True).values
    return (rows / rows.sum(1, keepdim=True)).cumsum(1).mean(0).tolist()


def _rows(scores: Scores, axis: str, layer: int | None, config: ModelConfig) -> torch.Tensor:
    """Scores of one layer, float64 [KV groups or 1, units]."""
    where, count = axis if layer is None else f"{axis} in layer {layer}", AXES.get(axis).count(config)
    units = scores.get((axis, layer))
    if units is None or units.numel() != count:
        raise InputError(f"scores of {where}", got="none" if units is None else units.numel(), needed=f"{count}, one per unit")
    if not units.isfinite().all():
        raise InputError(f"scores of {where} are not finite", do="look for NaN or infinity in the model's weights or activations")
    return units.to(torch.float64).clamp(min=0).view(-1, units_each(config, axis))
