"""What a shape is expected to cost in quality, from a metric's own scores, and the order of shapes by it."""

from __future__ import annotations

from functools import cache
from math import inf, isnan, log
from typing import Callable

import torch

from megatron_prune.arch.model import ModelConfig
from megatron_prune.axes.axis import AXES
from megatron_prune.errors import InputError
from megatron_prune.planning.budget import parameters
from megatron_prune.planning.multiples import VARIED
from megatron_prune.planning.selection import Scores

LOSS_WEIGHTS = {"hidden": 2.96, "ffn": 1.16, "head": 0.40, "kv_head": 0.72, "layer": 1.28}
"""Rise of the log perplexity per −log(share that stays). Measured on SmolLM2-135M-Instruct, re-fitted, one axis at a time
(``docs/quality.md``: ffn 1152, hidden 512 tied, 24 layers, 2 of 3 KV groups, 6 of 9 query heads), with even scores. Hidden 512
with ffn 1152 then comes out 8 % too high, 22 layers with ffn 1408 within 1 %."""


def rank_candidates(
    config: ModelConfig, candidates: list[ModelConfig], loss: Callable[[ModelConfig], float]
) -> list[tuple[float, ModelConfig]]:
    """(loss, shape) by loss, ascending; among equals more parameters first, then fewer axes cut. NaN counts as infinite."""
    measured = [(inf if isnan(value := float(loss(shape))) else value, shape) for shape in candidates]
    return sorted(measured, key=lambda pair: (pair[0], -parameters(pair[1]), len(cut_axes(config, pair[1]))))


def cut_axes(config: ModelConfig, new: ModelConfig) -> list[str]:
    """Axes on which ``new``, or a layer of it, is smaller than a model whose layers are alike.

    Query heads that go with their KV group are not cut themselves.
    """
    layers = [new] if new.is_uniform else [new.of_layer(layer) for layer in range(new.num_layers)]
    less = lambda name, layer: _units_each(layer, name) < _units_each(config, name) and (name != "head" or layer.units(name))
    return [name for name in VARIED if any(less(name, layer) for layer in layers)]


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
            keep, shares = _units_each(target, axis), curve(axis)
            stays = min(1.0, (1 - even) * shares[keep - 1] + even * keep / len(shares))
            total += LOSS_WEIGHTS[axis] * -log(stays) if stays > 0 else inf
        return total

    return loss


def _units_each(config: ModelConfig, axis: str) -> int:
    """Units of an axis; query heads are counted within their KV group."""
    return config.heads_per_group if axis == "head" else AXES.get(axis).count(config)


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
    return units.to(torch.float64).clamp(min=0).view(-1, _units_each(config, axis))
