"""Measuring and re-fitting under megatron-core: TP × PP × DP."""

from __future__ import annotations

from dataclasses import replace
from typing import Callable

import torch

from megatron_prune.arch.model import ModelConfig
from megatron_prune.arch.sharding import ParallelLayout, legal_tensor_sizes
from megatron_prune.checkpoint.tensor_map import TensorMap
from megatron_prune.importance.metric import GradientMetric, Metric
from megatron_prune.planning.amounts import SAMPLED_TOGETHER
from megatron_prune.runtime.reporting import progress_bar
from megatron_prune.runtime.stage import Stage
from megatron_prune.runtime.world import World
from megatron_prune.text.tokens import Calibration


class MegatronEngine:
    """An :class:`~megatron_prune.pruning.engines.engine.Engine` on this run's processes.

    megatron-core is imported when it is first needed.

    Args:
        layout: how the run divides the model.
    """

    def __init__(self, layout: ParallelLayout, world: World):
        self.layout, self._world = layout, world

    def check_metrics(self, names: list[str]) -> None:
        """All can be measured."""

    def stage(self, *shapes: ModelConfig, dtype: torch.dtype, seq_length: int) -> Stage:
        from megatron_prune.runtime.megatron_stage import MegatronStage

        layout = self.layout
        if any(layout.tensor not in legal_tensor_sizes(shape) for shape in shapes):  # unbalance: ranks run whole layers
            layout = replace(layout, tensor=1)
        return MegatronStage(layout, self._world, dtype=dtype, seq_length=seq_length)

    def sample(
        self,
        tensors: TensorMap,
        dtype: torch.dtype,
        *,
        count: int,
        length: int,
        seed: int,
        bos: int | None,
        progress: Callable[[int], None],
    ) -> torch.Tensor:
        from megatron_prune.runtime.model import build_model, stop_parallel
        from megatron_prune.runtime.sampling import sample

        model = build_model(tensors, self.layout, self._world, dtype=dtype, seq_length=length)
        tokens = sample(model, count=count, length=length, seed=seed, bos=bos, batch_size=SAMPLED_TOGETHER, progress=progress)
        stop_parallel()
        return tokens

    def whole_model_passes(self, metrics: list[Metric], tensors: TensorMap, calibration: Calibration, dtype: torch.dtype) -> None:
        from megatron_prune.importance.gradients import collect_gradients
        from megatron_prune.importance.losses import collect_losses
        from megatron_prune.runtime.model import build_model, stop_parallel

        world, length, tokens = self._world, calibration.tokens.shape[1], calibration.tokens.numel()
        model = build_model(tensors, self.layout, world, dtype=dtype, seq_length=length)
        statistics = metrics[0].statistics
        gradient = [metric for metric in metrics if isinstance(metric, GradientMetric)]
        if gradient:
            copies = world.size // (self.layout.tensor * self.layout.pipeline)
            passes = len({objective for metric in gradient for objective in metric.objectives})
            with progress_bar("gradients", tokens * passes // copies, shown=world.is_main, unit="tokens") as advance:
                collect_gradients(gradient, tensors, model, calibration, statistics, world, progress=advance)
        if any("losses" in metric.needs for metric in metrics):
            total = tokens * (tensors.config.num_layers + 1)
            with progress_bar("without each layer", total, shown=world.is_main, unit="tokens") as advance:
                collect_losses(model, calibration, statistics, world, progress=advance)
        stop_parallel()
