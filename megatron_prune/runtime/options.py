"""How many processes run a model, and in which element type."""

from __future__ import annotations

from dataclasses import dataclass

from megatron_prune.config import option

DTYPES = ["fp32", "bf16", "fp16"]
"""Element types, as options say them."""


@dataclass(frozen=True, kw_only=True)
class LayoutOptions:
    """The layout that a checkpoint is run at."""

    tensor_model_parallel_size: int | None = option(
        "tensor-parallel ranks (default: those of the checkpoint)", None, least=1, group="run"
    )
    pipeline_model_parallel_size: int | None = option(
        "pipeline stages (default: those of the checkpoint)", None, least=1, group="run"
    )
