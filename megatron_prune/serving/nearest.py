"""The shapes nearest to one that was asked for, of those that have no problem."""

from __future__ import annotations

import math
from dataclasses import replace
from itertools import islice, product
from typing import Callable, Iterator

from megatron_prune.arch.model import ModelConfig

SIZES = ("num_attention_heads", "num_query_groups", "hidden_size", "ffn_hidden_size")
SHOWN = 2
"""Shapes that are named."""
REACH = 512
"""Widths of the feed-forward block that are looked at on each side."""


def nearest_shapes(
    asked: ModelConfig,
    before: ModelConfig,
    problems: Callable[[ModelConfig], list[str]],
    legal: Callable[[ModelConfig], bool],
) -> list[ModelConfig]:
    """Up to two shapes whose layers are alike, nearest first: the sum of |log| of what sizes are multiplied with is least.

    Heads and KV groups are those that a cut can leave (the same number of query heads in every group), hidden the size that was
    asked for, or one that fits the heads.

    Args:
        before: the model that is cut; no size is larger.
        problems: what of a shape may not be.
        legal: whether a class can say it.
    """
    widths = _widths(asked, before, problems)
    shapes = [
        replace(asked, num_attention_heads=heads, num_query_groups=groups, hidden_size=hidden, ffn_hidden_size=width)
        for heads, groups in _pairs(before)
        for hidden, width in product(_hidden(asked, before, heads), widths)
    ]
    shapes.sort(key=lambda shape: _distance(shape, asked))
    return list(islice((shape for shape in shapes if not problems(shape) and legal(shape)), SHOWN))


def nearest_counts(asked: int, counts: range, problems: Callable[[int], list[str]], reach: int) -> list[int]:
    """The next numbers of tokens, down and up, that have no problem.

    Args:
        counts: those that are possible.
        reach: how far is looked on each side.
    """
    below = (count for count in range(min(asked, counts[-1]), max(counts[0], asked - reach) - 1, -1) if not problems(count))
    above = (count for count in range(max(asked, counts[0]), min(counts[-1], asked + reach) + 1) if not problems(count))
    return sorted({*islice(below, 1), *islice(above, 1)})


def sizes_in_words(shape: ModelConfig, asked: ModelConfig) -> str:
    """The sizes of a shape that were not asked for."""
    return ", ".join(f"{field} {getattr(shape, field)}" for field in SIZES if getattr(shape, field) != getattr(asked, field))


def _widths(asked: ModelConfig, before: ModelConfig, problems: Callable[[ModelConfig], list[str]]) -> list[int]:
    """The width that was asked for; or the next ones, down and up, with which fewest problems are left, if it is one of them."""
    wanted, most = asked.units("ffn"), before.units("ffn")
    left = lambda width: len(problems(replace(asked, ffn_hidden_size=width)))
    counts = {width: left(width) for width in range(max(1, wanted - REACH), min(most, wanted + REACH) + 1)}
    least = min(counts.values())
    if counts[wanted] == least:
        return [wanted]
    able = [width for width, count in counts.items() if count == least]
    below, above = [width for width in able if width < wanted], [width for width in able if width > wanted]
    return below[-1:] + above[:1]


def _pairs(before: ModelConfig) -> Iterator[tuple[int, int]]:
    """(query heads, KV groups) that a cut can leave."""
    for groups in range(1, before.units("kv_head") + 1):
        for each in range(1, before.heads_per_group + 1):
            yield groups * each, groups


def _hidden(asked: ModelConfig, before: ModelConfig, heads: int) -> set[int]:
    """The hidden size that was asked for, and those next to it that are heads × head_dim, or that heads divide."""
    below = asked.hidden_size - asked.hidden_size % heads
    sizes = {asked.hidden_size, heads * asked.kv_channels, below, below + heads}
    return {size for size in sizes if 0 < size <= before.hidden_size}


def _distance(shape: ModelConfig, asked: ModelConfig) -> float:
    return sum(abs(math.log(getattr(shape, field) / getattr(asked, field))) for field in SIZES)
