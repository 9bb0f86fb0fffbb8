"""What ranks run for tests of gradients and losses: plain functions of a module that spawned processes can import."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from megatron_prune.checkpoint import megatron
from megatron_prune.importance.metric import metric_named
from megatron_prune.importance.statistics import Statistics
from megatron_prune.runtime.model import build_model, stop_parallel
from megatron_prune.runtime.world import World
from megatron_prune.text.tokens import Calibration


def _run(world: World, checkpoint: str, folder: str, samples: dict[str, Any], tp: int, pp: int, dtype: str, function) -> Any:
    """``function(model, tensors, calibration, statistics)`` on a running model of this layout."""
    from rank_jobs import forget_groups

    opened = megatron.open_checkpoint(Path(checkpoint))
    kinds = {"tokens": torch.int64, "lengths": torch.int64, "weights": torch.float64}
    calibration = Calibration(**{name: torch.tensor(samples[name], dtype=kind) for name, kind in kinds.items()})
    Path(folder).mkdir(parents=True, exist_ok=True)
    statistics = Statistics(folder=Path(folder), config=opened.config)
    layout = replace(opened.layout, tensor=tp, pipeline=pp)
    try:
        model = build_model(opened.tensors, layout, world, dtype=getattr(torch, dtype), seq_length=calibration.tokens.shape[1])
        return function(model, opened.tensors, calibration, statistics)
    finally:
        stop_parallel()
        forget_groups()


def gradients(world: World, checkpoint: str, folder: str, samples: dict, tp: int, pp: int, metrics: list[str], dtype: str) -> int:
    """``collect_gradients`` into ``folder`` → the tokens that were reported as done."""
    from megatron_prune.importance.gradients import collect_gradients

    counted = [0]

    def count(tokens: int) -> None:
        counted[0] += tokens

    def collect(model, tensors, calibration, statistics):
        wanted = [metric_named(name, statistics=statistics) for name in metrics]
        collect_gradients(wanted, tensors, model, calibration, statistics, world, progress=count)
        left = [name for name, parameter in model.module.named_parameters() if parameter.grad is not None]
        assert not left, f"gradients left on {left}"

    _run(world, checkpoint, folder, samples, tp, pp, dtype, collect)
    return counted[0]


def trial_gradients(world: World, *args: Any) -> int:
    """``gradients`` with the metrics and the objective of ``trial_metrics`` beside those that are shipped."""
    from trial_metrics import registered

    with registered(objective=True):
        return gradients(world, *args)


def losses(world: World, checkpoint: str, folder: str, samples: dict, tp: int, pp: int) -> int:
    """``collect_losses`` into ``folder`` → the number of passes over the text."""
    from megatron_prune.importance.losses import collect_losses

    passes = []

    def collect(model, tensors, calibration, statistics):
        collect_losses(model, calibration, statistics, world, progress=passes.append)

    _run(world, checkpoint, folder, samples, tp, pp, "float32", collect)
    return len(passes)
