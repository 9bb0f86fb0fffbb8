"""Measuring and re-fitting a Hugging Face model with transformers, in one process."""

from __future__ import annotations

from pathlib import Path
from typing import Callable

import torch

from megatron_prune.arch.model import ModelConfig
from megatron_prune.checkpoint.tensor_map import TensorMap
from megatron_prune.errors import InputError
from megatron_prune.families.family import Family
from megatron_prune.importance.gates import collect_gates
from megatron_prune.importance.metric import METRICS, Metric
from megatron_prune.pruning.measure import Subject
from megatron_prune.runtime.huggingface_stage import HuggingFaceStage
from megatron_prune.runtime.reporting import progress_bar
from megatron_prune.runtime.stage import Stage
from megatron_prune.runtime.world import World
from megatron_prune.text.hf_samples import sample_hf
from megatron_prune.text.tokens import Calibration


class HuggingFaceRunner:
    """``pruning/measure.py:Runner`` with transformers.

    Args:
        folder: Hugging Face directory of the model.
        family: its family.
    """

    def __init__(self, folder: Path, family: Family):
        self._folder, self._family = folder, family

    def stage(self, *shapes: ModelConfig, dtype: torch.dtype, seq_length: int) -> Stage:
        return HuggingFaceStage(self._family, dtype=dtype, seq_length=seq_length)

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
        return sample_hf(self._folder, count=count, length=length, seed=seed, bos=bos, dtype=dtype, progress=progress)

    def whole_model_passes(
        self, metrics: list[Metric], subject: Subject, calibration: Calibration, dtype: torch.dtype, world: World
    ) -> None:
        """Gates only: :func:`check_metrics` has refused the others."""
        tokens = int(calibration.lengths.sum())
        with progress_bar("gradients", tokens, shown=world.is_main, unit="tokens") as advance:
            collect_gates(self._folder, subject.config, calibration, metrics[0].statistics, dtype=dtype, progress=advance)


def check_metrics(names: list[str]) -> None:
    """Refuse metrics that need gradients of weights, or losses of changed models.

    Raises:
        InputError: naming the metric and what it needs.
    """
    able = [name for name in METRICS.names() if not _lacking(METRICS.get(name))]
    for name in names:
        if wanted := _lacking(METRICS.get(name)):
            raise InputError(
                f"metric {name} needs {wanted}, which this route does not compute",
                needed="one of " + ", ".join(able),
                do="convert the model to Megatron (megatron-prune convert) and prune it there (prune_llama.py)",
            )


def _lacking(kind: type[Metric]) -> str | None:
    if "losses" in kind.needs:
        return "losses of the whole model without each of its layers"
    if "gradients" in kind.needs and kind.sums != {"gates"}:
        return "gradients of the weights"
    return None
