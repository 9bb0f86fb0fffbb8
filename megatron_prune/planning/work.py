"""What steps do: floating-point operations, and bytes that are read and written; and the time that takes at given rates.

Operations are those of matrix products, a multiply-add counted as two, attention over the half of the keys that a causal mask
leaves (as in ``resources.py``); of a Cholesky factor n³/3, of solving with it 2n² for every right-hand side (Golub & Van Loan,
Matrix Computations, 4.2 and 3.1). Sampling reads the weights and the cached keys and values for every token of a batch, which
takes longer than its products (Pope et al. 2022, arXiv 2211.05102). Nothing is counted as overlapping.

Operations are counted in real runs in the tests; what share of a device's best rate they reach has not been measured.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import ceil
from typing import NamedTuple

from megatron_prune.arch.blocks.block import BLOCKS
from megatron_prune.arch.model import ModelConfig
from megatron_prune.arch.sharding import ParallelLayout
from megatron_prune.planning.amounts import HELD_OUT, PROBED, SAMPLED_TOGETHER, WINDOW_PASSES
from megatron_prune.planning.budget import cached_features
from megatron_prune.planning.costs import levels
from megatron_prune.planning.passes import Text, cut_kinds, cuts_stream, window_of
from megatron_prune.planning.resources import (
    block_flops,
    forward_flops,
    head_flops,
    layer_flops,
    rank_parameters,
    weight_bytes,
)

TRIED = 5
"""Strengths that a least-squares fit tries (from 3 to 11, by how the text is)."""


class Work(NamedTuple):
    """What a step does.

    Attributes:
        half: operations in bfloat16 or float16, of the rank that does most.
        full: those in float32 and float64.
        moved: bytes that a rank reads of its own memory, where that takes longer than the products.
        disk: bytes read and written, all processes together.
    """

    half: float = 0.0
    full: float = 0.0
    moved: float = 0.0
    disk: float = 0.0

    def __add__(self, other: Work) -> Work:
        return Work(*map(sum, zip(self, other)))

    @property
    def operations(self) -> float:
        """Of a rank."""
        return self.half + self.full


def products(flops: float, width: int) -> Work:
    """Operations on numbers of ``width`` bytes."""
    return Work(half=flops) if width == 2 else Work(full=flops)


@dataclass(frozen=True, kw_only=True)
class Rates:
    """How fast a device and a disk are, a second.

    Attributes:
        half: operations of a device in bfloat16 and float16.
        full: the same in float32 and float64.
        moved: bytes that a device reads of its memory.
        disk: bytes read or written, all processes together.
    """

    half: float
    full: float
    moved: float
    disk: float

    def seconds(self, work: Work) -> float:
        """Time of some work."""
        return sum(amount / rate for amount, rate in zip(work, (self.half, self.full, self.moved, self.disk)))


def sampling_work(config: ModelConfig, layout: ParallelLayout, text: Text, copies: int) -> Work:
    """The model samples all of the text; stages of a pipeline wait for each other.

    Args:
        copies: data-parallel ones, which share the samples.
    """
    mine = ceil(text.samples / copies)
    batches = ceil(mine / SAMPLED_TOGETHER)
    weights = text.width * rank_parameters(config, layout) * layout.pipeline
    cached = 2 * cached_features(config) * text.width // layout.tensor
    moved = text.seq_length * (batches * weights + mine * cached * text.seq_length / 2)
    forward = mine * text.seq_length * forward_flops(config, text.seq_length) / layout.tensor
    return products(forward, text.width) + Work(moved=moved, disk=weight_bytes(config, 2) + 8 * text.samples * text.seq_length)


def measuring_work(config: ModelConfig, layout: ParallelLayout, text: Text, moments: list[int]) -> Work:
    """Statistics of every layer; see :func:`passes.measuring_memory`."""
    layers = map(config.of_layer, range(config.num_layers))
    forward = text.tokens * sum(layer_flops(layer, text.seq_length) for layer in layers) / layout.tensor
    moment = text.tokens * config.num_layers * sum(width * width for width in moments) / layout.tensor
    filed = 8 * config.num_layers * sum(width * width for width in moments)
    return products(forward, text.width) + Work(full=moment, disk=weight_bytes(config, 2) + 2 * filed)


def gradient_work(config: ModelConfig, layout: ParallelLayout, text: Text, copies: int) -> Work:
    """A forward and a backward pass over every sample, one at a time through the stages; without gradients of weights, half of
    the backward pass.

    Args:
        copies: data-parallel ones, which share the samples.
    """
    mine = ceil(text.samples / copies)
    waiting = (mine + layout.pipeline - 1) / mine
    each = 2.0 * text.seq_length * forward_flops(config, text.seq_length) / (layout.tensor * layout.pipeline)
    return products(mine * each * waiting, text.width) + Work(disk=weight_bytes(config, 2))


def probing_work(config: ModelConfig, layout: ParallelLayout, text: Text) -> Work:
    """Every block of the model with each of several writers, to the end; every level of all blocks together."""
    tokens, ranks, total = min(PROBED, text.samples) * text.seq_length, layout.tensor, Work()
    layers = [config.of_layer(layer) for layer in range(config.num_layers)]
    each = [layer_flops(layer, text.seq_length) for layer in layers]
    weights = weight_bytes(config, 2) / sum(each)  # as good as in proportion
    stored = [weights * flops for flops in each]
    total += products(tokens * sum(each) / ranks, text.width)  # the dense stream, block by block
    for number, layer in enumerate(layers):
        for place, kind in enumerate(layer.kinds):
            writers, inside = len(levels(kind)), layer.size(kind.inside_space)
            after = sum(block_flops(other, layer, text.seq_length) for other in layer.kinds[place + 1 :])
            own = block_flops(kind, layer, text.seq_length) + writers * (2.0 * inside * config.hidden_size + after)
            passes = tokens * (own / ranks + writers * (sum(each[number + 1 :]) / ranks + head_flops(config)))
            solved = sum(_solving(round(inside * level.share), config.hidden_size) for level in levels(kind))
            total += products(passes / text.copies, text.width)
            total += Work(full=solved / text.copies, disk=sum(stored[number:]) / text.copies)
    together = 1 + sum(len(levels(BLOCKS.get(name))) for name in config.blocks)
    whole = tokens * (sum(each) / ranks + head_flops(config))
    return total + products(together * whole / text.copies, text.width) + Work(disk=together * sum(stored) / text.copies)


def refit_work(config: ModelConfig, target: ModelConfig, layout: ParallelLayout, text: Text, passes: int) -> Work:
    """Re-fitting, once: where it leaves a model far from the dense one, ``prune`` fits a second time. Layers that go are taken to
    go as one block.

    Args:
        passes: over the text in which all matrices of a cut block are fitted together.
    """
    tokens, ranks, width, hidden = text.tokens, layout.tensor, target.hidden_size, config.hidden_size
    new = [target.of_layer(layer) for layer in range(target.num_layers)]
    dense = sum(layer_flops(config.of_layer(layer), text.seq_length) for layer in range(config.num_layers))
    total = products(tokens * dense / ranks, text.width)
    gone = target.num_layers < config.num_layers
    for number, layer in enumerate(new):
        cut = cut_kinds(config, target, layer)
        for kind in layer.kinds:
            folds = gone and number == 0 and kind is layer.kinds[-1]
            if kind not in cut and not folds:
                continue
            inside, flops = layer.size(kind.inside_space), block_flops(kind, layer, text.seq_length)
            total += products(tokens * flops / ranks, text.width) + Work(full=_fitting(tokens / ranks, inside, width))
            if cuts_stream(config, target):
                total += products(2 * tokens * 2 * hidden * width, text.width)
                total += Work(full=_fitting(tokens / ranks, width, hidden))
            if kind in cut:
                total += products(passes * _pass(tokens, flops) / ranks, text.width)
    if gone:
        flops = window_of(config, target) * max(layer_flops(layer, text.seq_length) for layer in new)
        total += products(WINDOW_PASSES * passes * _pass(tokens, flops) / ranks, text.width)
    pruned = sum(layer_flops(layer, text.seq_length) for layer in new)
    compared = tokens / HELD_OUT * (pruned / ranks + head_flops(target) + head_flops(config))
    disk = 2 * weight_bytes(config, 2) + 2 * weight_bytes(target, 4)
    return total + products(compared, text.width) + Work(disk=disk)


def _fitting(tokens: float, features: int, targets: int) -> float:
    """Second moments, of which half are products, and a least-squares fit with its strength chosen across two halves of them."""
    tried = 2 * TRIED * (_solving(features, targets) + 2.0 * features**2 * targets)
    return tokens * (features**2 + 2 * features * targets) + tried + _solving(features, targets)


def _pass(tokens: float, flops: float) -> float:
    """A pass of a joint fit: forward and backward over what is fitted to, forward over what is held out."""
    held = tokens / HELD_OUT
    return flops * (3 * (tokens - held) + held)


def _solving(features: int, targets: int) -> float:
    """A ridge regression: the right-hand side, a Cholesky factor, and two triangular solutions."""
    return features**3 / 3.0 + 2.0 * features**2 * targets + 2.0 * features**2 * targets
