"""The empirical Fisher information of a gate on every unit's output, token by token.

A gate m = 1 multiplies what a unit passes on at a token; ``∂L/∂m`` there is ``sum over the unit's features of a · ∂L/∂a``.
``s_u = sum over tokens of (∂L/∂m)²``: Molchanov et al. 2019 (arXiv 1906.10771), whose gates are shared by the positions of
a sample; here every token has its own. Channels so chosen measured best before least squares (``pruning/options.py:BEST``). L is
the sum of a sample's token losses.

A channel's output is the input of ``down``, a head's the input of ``o`` (head_dim features under one gate); a KV group
counts the sum over its query heads.
"""

from __future__ import annotations

from megatron_prune.importance.metric import METRICS, GradientMetric


@METRICS.register("fisher")
class Fisher(GradientMetric):
    """Squared activation times gradient."""

    sums = frozenset({"gates"})
    axes = frozenset({"ffn", "head", "kv_head"})
