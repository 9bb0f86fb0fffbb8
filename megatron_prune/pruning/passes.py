"""The passes over text that a pruning makes."""

from __future__ import annotations

from typing import NamedTuple

from megatron_prune.arch.blocks.block import BLOCKS
from megatron_prune.arch.model import ModelConfig
from megatron_prune.pruning.metric_facts import metric_facts
from megatron_prune.pruning.request import Request
from megatron_prune.text.data_specs import parse_data

PASSES = {
    "sampling": "sampling text",
    "measuring": "measuring",
    "gradients": "scoring by gradients",
    "probing": "costs of blocks",
    "re-fitting": "re-fitting",
}
"""Label of a pass's progress → what ``estimate`` calls it, in their order."""


class Reading(NamedTuple):
    """What a pruning reads and measures: any text at all, which (as ``--data``), the scores of a run before, costs of blocks; and
    whether what stays is re-fitted."""

    text: bool
    data: tuple[str, ...] | None
    scores: bool = False
    costs: bool = False
    refit: bool = True


def sites_of(request: Request, config: ModelConfig, reading: Reading) -> frozenset[str]:
    """What second moments are taken of: for metrics, for a rotation, and for writers that costs are measured with."""
    sites = frozenset() if reading.scores else request.moments(config)
    sites |= frozenset({"stream"} if request.rotates(config) else ())
    return sites | frozenset(BLOCKS.get(name).inside for name in config.blocks if reading.costs)


def passes_of(request: Request, config: ModelConfig, reading: Reading) -> list[str]:
    """Labels of the passes that will run, in their order."""
    if not reading.text:
        return []
    named = [] if reading.scores else [*request.metrics(config), *request.fallback_metrics(config)]
    needs = frozenset().union(*(metric_facts(name).needs for name in named))
    reads_text = not reading.scores or reading.data is not None
    wanted = {
        "sampling": reads_text and any(spec.name == "self" for spec in parse_data(reading.data)),
        "measuring": bool(sites_of(request, config, reading)) or "activations" in needs,
        "gradients": "gradients" in needs,
        "probing": reading.costs,
        "re-fitting": reading.refit,
    }
    return [label for label in PASSES if wanted[label]]
