"""What ``inspect`` can be asked."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from megatron_prune.config import option
from megatron_prune.opening.options import ForeignOptions


@dataclass(frozen=True, kw_only=True)
class InspectOptions(ForeignOptions):
    """Print what a Megatron checkpoint or a Hugging Face model is, without reading its weights unless asked to."""

    EXAMPLES: ClassVar = {"all": "megatron-prune inspect ckpt/pruned --weights"}

    load: str = option(
        "Megatron checkpoint, Hugging Face directory, config.json, or hub id", group="model", former=("path",), positional=True
    )
    weights: bool = option(
        "read all weights; name those that hold NaN or infinity, and those that are not as they were written (exit code 1)", False
    )
    json: bool = option("print JSON", False, group="run")
