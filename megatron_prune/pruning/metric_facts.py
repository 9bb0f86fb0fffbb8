"""What a request asks of metrics. Those that are taken where none is named are known without loading them, which takes torch."""

from __future__ import annotations

from typing import NamedTuple

from megatron_prune.errors import InputError


class MetricFacts(NamedTuple):
    """Of a metric (``importance/metric.py``): its spelling, the axes that it scores, what it needs of the text, axis → site whose
    second moments it reads, and whether it judges blocks of layers as a whole."""

    spelling: str
    axes: frozenset[str]
    needs: frozenset[str]
    moments: dict[str, str] = {}
    block_wise: bool = False


_WIDTHS, _FORWARD = frozenset({"ffn", "head", "kv_head"}), frozenset({"activations"})
_KNOWN = (
    MetricFacts("activation", _WIDTHS | {"hidden", "layer"}, _FORWARD),
    MetricFacts("angular", frozenset({"layer"}), _FORWARD, block_wise=True),
    MetricFacts("fisher", _WIDTHS, frozenset({"gradients"})),
    MetricFacts("fold", frozenset({"layer"}), _FORWARD, {"layer": "rows"}, block_wise=True),
    MetricFacts("obs", _WIDTHS, _FORWARD, {"ffn": "channels", "head": "context", "kv_head": "context"}),
)
KNOWN = {facts.spelling: facts for facts in _KNOWN}
"""Spelling → facts: of ``BEST`` and ``QUICK``, and of what stands in for these."""


def metric_facts(spelling: str) -> MetricFacts:
    """The facts of the metric that is written as ``spelling``.

    Raises:
        InputError: if there is no such metric, or it takes no such parameters.
    """
    if spelling in KNOWN:
        return KNOWN[spelling]
    from megatron_prune.importance.metric import metric_named

    metric = metric_named(spelling)
    return MetricFacts(metric.spelling, metric.axes, metric.needs, dict(metric.moments), metric.block_wise)


def check_scores_axis(name: str, axis: str) -> None:
    """Refuse a metric that cannot score an axis.

    Raises:
        InputError: naming those that can.
    """
    if axis in metric_facts(name).axes:
        return
    from megatron_prune.importance.metric import METRICS

    able = [other for other in METRICS.names() if axis in METRICS.get(other).axes]
    raise InputError(f"metric {name} cannot score the axis {axis}", needed="one of " + ", ".join(able))
