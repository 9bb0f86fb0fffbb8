"""How large a unit's activations are on the calibration text.

Minitron (Muralidharan et al. 2024, arXiv 2407.14679) scores a feed-forward channel by its activation, a head by the L2
norm of its output over head_dim, a residual channel by the output of every norm, summed over the norms. ``minitron`` is
its own aggregation: the mean over a sample's tokens of \\|a\\|, then the L2 norm over samples. ``activation`` is the L2
norm over all tokens, which measured better in first trials (perplexity 72.5 against 79.7 on one protocol).

The activation of a channel is the input of ``down``, that of a head the input of ``o``; a KV group has those of its query
heads. A layer is scored by the norm of all that enters its two output matrices.
"""

from __future__ import annotations

import torch
from torch import Tensor

from megatron_prune.importance.metric import METRICS, Metric
from megatron_prune.importance.statistics import FINAL_SITE, SiteStatistics


@METRICS.register("activation")
class Activation(Metric):
    """L2 norm over all tokens."""

    needs = frozenset({"activations"})

    def finish(self, axis: str, layer: int | None, total: Tensor) -> Tensor:
        config, of = self.statistics.config, self.statistics.layer
        kinds = lambda number: config.of_layer(number).kinds
        if axis == "hidden":
            norms = [of(number).sites[kind.norm] for number in range(config.num_layers) for kind in kinds(number)]
            return sum(self.energy(site).sqrt() for site in (*norms, of(None).sites[FINAL_SITE]))
        if axis == "layer":
            whole = lambda number: sum(self.energy(of(number).sites[kind.inside]).sum() for kind in kinds(number))
            return torch.stack([torch.as_tensor(whole(number)) for number in range(config.num_layers)]).sqrt()
        site = of(layer).sites[config.of_layer(layer).block_of(axis).inside]
        return self.energy(site).view(len(total), -1).sum(dim=1).sqrt()

    def energy(self, site: SiteStatistics) -> Tensor:
        """Square of a feature's aggregated activation, float64 [features]."""
        return site.squares


@METRICS.register("minitron")
class Minitron(Activation):
    """Mean over a sample's tokens of the absolute value, then L2 over samples."""

    def energy(self, site: SiteStatistics) -> Tensor:
        return site.sample_means
