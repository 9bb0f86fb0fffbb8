"""What a pass over text leaves behind, made by hand from activations that a test can compute with."""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors.torch import save_file

from megatron_prune.arch.model import ModelConfig
from megatron_prune.axes.axis import AXES
from megatron_prune.importance.metric import METRICS, GradientMetric
from megatron_prune.importance.statistics import SITES, LayerStatistics, SampledRows, SiteStatistics, Statistics

SAMPLES, TOKENS = 3, 40
"""Samples, and tokens in each."""


def activations(config: ModelConfig, seed: int = 0) -> dict[tuple[str, int | None], torch.Tensor]:
    """(site or ``before``, layer) → float64 [samples, tokens, features], correlated and off centre."""
    generator = torch.Generator().manual_seed(seed)
    draw = lambda *shape: torch.randn(shape, dtype=torch.float64, generator=generator)
    found = {}
    for layer in (*range(config.num_layers), None):
        sites = SITES if layer is not None else {"final_norm": "hidden"}
        for site, label in {**sites, "before": "hidden"}.items():
            width = config.hidden_size if label == "hidden" else config.dims[label]
            found[site, layer] = draw(SAMPLES, TOKENS, width) @ draw(width, width) / width**0.5 + 0.3 * draw(width)
    return found


def measured(folder: Path, config: ModelConfig, seen: dict[tuple[str, int | None], torch.Tensor]) -> Statistics:
    """The files of a pass that saw ``seen`` (every token of weight 1), and of passes with gradients and losses."""
    generator = torch.Generator().manual_seed(1)
    draw = lambda count: torch.rand(count, dtype=torch.float64, generator=generator)
    folder.mkdir(parents=True, exist_ok=True)
    statistics = Statistics(folder=folder, config=config)
    for layer in (*range(config.num_layers), None):
        sites = {}
        for site in SITES if layer is not None else ["final_norm"]:
            x = seen[site, layer]
            flat = x.flatten(0, 1)
            sites[site] = SiteStatistics(
                tokens=float(len(flat)),
                total=flat.sum(0),
                squares=flat.square().sum(0),
                sample_means=x.abs().mean(1).square().sum(0),
                moment=flat.T @ flat,
            )
        last = seen["before", layer][:, -1].float()
        stream, channels = seen["before", layer].flatten(0, 1), seen.get(("channels", layer))
        kernel = None if channels is None else (channels.flatten(0, 1) @ channels.flatten(0, 1).T).float()
        rows = SampledRows(weights=1.0 + torch.arange(len(stream)).double() % 2, stream=stream.float(), kernel=kernel)
        LayerStatistics(sites=sites, similarity=draw(1).item(), last=last, rows=rows).save(statistics.path(layer))
    kinds = [METRICS.get(name) for name in METRICS.names()]
    sums = {}
    for kind in kinds:
        for axis in sorted(kind.axes) if issubclass(kind, GradientMetric) else []:
            for layer in range(config.num_layers) if AXES.get(axis).per_layer else ["all"]:
                sums[f"{kind.name}.{axis}.{layer}"] = draw(AXES.get(axis).count(config))
    save_file(sums, folder / "gradients.safetensors")
    save_file({"losses": 5.0 + draw(config.num_layers + 1)}, folder / "losses.safetensors")
    return statistics
