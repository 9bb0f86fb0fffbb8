"""Metrics and an objective that only tests have: what whole units, last words and functionals are for.

``trial_saliency`` is made as AFR for feed-forward channels is: per sample the trimmed mean, over hidden coordinates, of weight
times gradient summed over the three matrices; of two functionals, each standardised over all layers. ``trial_spread`` sees
weights alone, and wants a sort and a decomposition of every unit.
"""

from __future__ import annotations

from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Iterator

import torch
from torch import Tensor

from megatron_prune.config import option
from megatron_prune.importance.metric import METRICS, GradientMetric, Metric, Part
from megatron_prune.planning.selection import Scores

BLOCK_AXES = frozenset({"ffn", "head", "kv_head"})


class Spread(Metric):
    """|mean| / standard deviation of a unit's trimmed weights, and the singular values of each of its matrices."""

    axes = BLOCK_AXES
    reads_units = True

    def per_unit(self, axis: str, layer: int, parts: dict[str, Part], samples: float) -> Tensor:
        assert samples == 0 and not any(part.sums for part in parts.values())
        every = torch.cat([part.weight.flatten(1) for part in parts.values()], dim=1).sort(dim=1).values[:, 2:-2]
        ratio = every.mean(dim=1).abs() / (every.std(dim=1) + 1e-8)
        return ratio + sum(torch.linalg.svdvals(part.weight).sum(dim=1) for part in parts.values() if part.weight.dim() == 3)

    def finish(self, axis: str, layer: int | None, total: Tensor) -> Tensor:
        return total


class Standardised(Spread):
    """The same, standardised over all layers, from below its mean up."""

    signed = True

    def conclude(self, scores: Scores) -> Scores:
        every = torch.cat(list(scores.values()))
        return {place: (value - every.mean()) / every.std() for place, value in scores.items()}


class Saliency(GradientMetric):
    """Made as AFR is."""

    @dataclass(frozen=True, kw_only=True)
    class Parameters:
        trim: int = option("coordinates left out at both ends", 1, least=0)

    axes = frozenset({"ffn"})
    sums = frozenset({"sample"})
    objectives = ("trial_features", "cross_entropy")
    reads_units, signed = True, True

    def per_unit(self, axis: str, layer: int, parts: dict[str, Part], samples: float) -> Tensor:
        assert samples == 1
        product = sum(part.weight * part.sums["sample"] for part in parts.values())[:, 0].sort(dim=1).values
        return product[:, self.parameters.trim : product.shape[1] - self.parameters.trim].mean(dim=1).abs()

    def conclude(self, scores: Scores) -> Scores:
        squares = {place: self.gradient_sums(*place, "cross_entropy").square() for place in scores}
        return {place: _standard(value, scores) + _standard(squares[place], squares) for place, value in scores.items()}


def _standard(value: Tensor, every: Scores) -> Tensor:
    whole = torch.cat(list(every.values()))
    return (value - whole.mean()) / whole.std()


class Group(GradientMetric):
    """A group's first-order change as a whole, squared, and its diagonal second order: of sums over all samples."""

    axes = BLOCK_AXES
    sums = frozenset({"total", "squares"})
    reads_units = True

    def per_unit(self, axis: str, layer: int, parts: dict[str, Part], samples: float) -> Tensor:
        first = sum((part.weight * part.sums["total"]).flatten(1).sum(dim=1) for part in parts.values()) / samples
        second = sum((part.weight.square() * part.sums["squares"]).flatten(1).sum(dim=1) for part in parts.values()) / samples
        return first.square() + 0.5 * second


KINDS = {"trial_spread": Spread, "trial_standardised": Standardised, "trial_saliency": Saliency, "trial_group": Group}


@contextmanager
def registered(objective: bool = False) -> Iterator[None]:
    """Inside, the metrics above can be asked for by name; and, where megatron-core runs, the objective."""
    METRICS.names()
    for name, kind in KINDS.items():
        METRICS.register(name)(kind)
    if objective:
        from megatron_prune.importance.objective import OBJECTIVES

        OBJECTIVES.names()
        OBJECTIVES.register("trial_features")(feature_norms())
    try:
        yield
    finally:
        for name in KINDS:
            del METRICS._entries[name]
        if objective:
            del OBJECTIVES._entries["trial_features"]


def feature_norms() -> type:
    """The class of an objective: sum of the Frobenius norms of what the matrices of feed-forward blocks give."""
    from megatron.core import parallel_state
    from megatron.core.tensor_parallel.mappings import reduce_from_tensor_model_parallel_region as over_ranks

    from megatron_prune.importance.objective import Objective

    class FeatureNorms(Objective):
        def __init__(self, model):
            super().__init__(model)
            self._handles, self._seen = [], []
            stage = parallel_state.get_pipeline_model_parallel_rank()
            layers = model.layout.stage_layers(stage, model.config.num_layers)
            for layer, module in zip(layers, model.module.decoder.layers):
                for kind in model.config.of_layer(layer).kinds:
                    for tensor in (part for part in kind.megatron if not kind.mixes_tokens and part.axis):
                        hook = partial(self._note, len(tensor.roles), tensor.split != "cols")
                        self._handles.append(module.get_submodule(tensor.module).register_forward_hook(hook))

        def _note(self, roles: int, shared: bool, module, given, output) -> None:
            self._seen += [(value, shared) for value in output[0].chunk(roles, dim=-1)]

        def part(self, tokens, length, output):
            seen, self._seen = self._seen, []
            squares = [(value[:length].float().square().sum(), shared) for value, shared in seen]
            return sum((over_ranks(value) if shared else value).sqrt() for value, shared in squares)

        def close(self):
            for handle in self._handles:
                handle.remove()

    return FeatureNorms
