"""What an engine answers for: layers that run, the model's own text, and the passes that need the whole model."""

from __future__ import annotations

from typing import Callable, Protocol

import torch

from megatron_prune.arch.model import ModelConfig
from megatron_prune.arch.sharding import ParallelLayout
from megatron_prune.checkpoint.tensor_map import TensorMap
from megatron_prune.importance.metric import Metric
from megatron_prune.runtime.stage import Stage
from megatron_prune.text.tokens import Calibration


class Engine(Protocol):
    """What runs the model: megatron-core under TP (``megatron.py``), or transformers (``huggingface.py``).

    Attributes:
        layout: how this run divides the model.
    """

    layout: ParallelLayout

    def check_metrics(self, names: list[str]) -> None:
        """Refuse metrics that this engine cannot measure.

        Raises:
            InputError: naming the metric and what it needs.
        """

    def stage(self, *shapes: ModelConfig, dtype: torch.dtype, seq_length: int) -> Stage:
        """Where single layers of these shapes run; to be closed."""

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
        """The model's own text, int64 [count, length], the same on every process."""

    def whole_model_passes(self, metrics: list[Metric], tensors: TensorMap, calibration: Calibration, dtype: torch.dtype) -> None:
        """Collect gradients and losses for the metrics that need them.

        Raises:
            InputError: if something is not finite.
        """
