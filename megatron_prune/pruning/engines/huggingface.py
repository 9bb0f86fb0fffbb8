"""Measuring and re-fitting a Hugging Face model with transformers, in one process."""

from __future__ import annotations

from typing import Callable

import torch

from megatron_prune.arch.model import ModelConfig
from megatron_prune.arch.sharding import ParallelLayout
from megatron_prune.checkpoint.tensor_map import TensorMap
from megatron_prune.errors import InputError
from megatron_prune.importance.gates import collect_gates
from megatron_prune.importance.metric import GATES, METRICS, Metric, metric_named
from megatron_prune.importance.statistics import CROSS_ENTROPY
from megatron_prune.opening.opened import Opened
from megatron_prune.runtime.huggingface_stage import HuggingFaceStage
from megatron_prune.runtime.reporting import progress_bar
from megatron_prune.runtime.stage import Stage
from megatron_prune.text.hf_samples import sample_hf
from megatron_prune.text.tokens import Calibration


class HuggingFaceEngine:
    """An :class:`~megatron_prune.pruning.engines.engine.Engine` with transformers, in one process.

    Args:
        model: a Hugging Face model.
    """

    layout = ParallelLayout()

    def __init__(self, model: Opened):
        self._model = model

    def check_metrics(self, names: list[str]) -> None:
        """Refuse metrics that need gradients of weights, or losses of changed models.

        Raises:
            InputError: naming the metric and what it needs.
        """
        for name in names:
            if wanted := _lacking(metric_named(name)):
                able = [other for other in METRICS.names() if not _lacking(METRICS.get(other))]
                raise InputError(
                    f"metric {name} needs {wanted}, which this route does not compute",
                    needed="one of " + ", ".join(able),
                    do="convert the model to Megatron (megatron-prune convert) and prune it there (prune_llama.py)",
                )

    def stage(self, *shapes: ModelConfig, dtype: torch.dtype, seq_length: int) -> Stage:
        return HuggingFaceStage(self._model.family, dtype=dtype, seq_length=seq_length)

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
        return sample_hf(self._model.path, count=count, length=length, seed=seed, bos=bos, dtype=dtype, progress=progress)

    def whole_model_passes(self, metrics: list[Metric], tensors: TensorMap, calibration: Calibration, dtype: torch.dtype) -> None:
        """Gates of cross-entropy only: :meth:`check_metrics` has refused all else."""
        tokens = int(calibration.lengths.sum())
        with progress_bar("gradients", tokens, shown=self._model.world.is_main, unit="tokens") as advance:
            found = metrics[0].statistics
            collect_gates(metrics, self._model.path, tensors.config, calibration, found, dtype=dtype, progress=advance)


def _lacking(metric: Metric | type[Metric]) -> str | None:
    if "losses" in metric.needs:
        return "losses of the whole model without each of its layers"
    if "gradients" in metric.needs and metric.sums != {GATES}:
        return "gradients of the weights"
    if "gradients" in metric.needs and metric.objectives != (CROSS_ENTROPY,):
        return "gradients of " + ", ".join(metric.objectives)
    return None
