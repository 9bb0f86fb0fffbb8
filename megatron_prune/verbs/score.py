"""What ``score`` can be asked."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from megatron_prune.config import option
from megatron_prune.opening.options import ForeignOptions
from megatron_prune.pruning.options import BEST, CalibrationOptions
from megatron_prune.runtime.options import LayoutOptions


@dataclass(frozen=True, kw_only=True)
class ScoreOptions(CalibrationOptions, ForeignOptions, LayoutOptions):
    """Score the units of every axis of a Megatron checkpoint, or of a Hugging Face model in one process, on calibration text."""

    EXAMPLES: ClassVar = {
        "all": "torchrun --nproc-per-node 3 -m megatron_prune score --load ckpt/dense --save scores --data calibration.txt",
        "how": "--metrics activation,obs:damping=0.1",
    }

    load: str = option(
        "Megatron checkpoint (its root, or an iteration directory), Hugging Face directory, or hub id",
        group="model",
        positional=True,
    )
    save: str = option("directory of scores to write", group="model")
    metrics: tuple[str, ...] = option(
        "metrics to score with, with parameters where they have any, as in obs:damping=0.1", tuple(sorted(set(BEST.values())))
    )
    tokenizer: str | None = option(
        "Hugging Face directory of the tokenizer (default: kept in the checkpoint)", None, group="model"
    )
    costs: bool = option("also measure what every block costs the model at every size, for prune --allocate free", False)
    overwrite: bool = option("replace an existing output directory", False, group="run")
