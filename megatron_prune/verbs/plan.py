"""What ``plan`` can be asked."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from megatron_prune.config import option
from megatron_prune.opening.options import ForeignOptions
from megatron_prune.pruning.options import ChoosingOptions, DivisionOptions
from megatron_prune.runtime.options import LayoutOptions


@dataclass(frozen=True, kw_only=True)
class PlanOptions(ChoosingOptions, DivisionOptions, ForeignOptions, LayoutOptions):
    """Choose what stays of a model of either kind and write it as a plan, a JSON file to read and edit; no model is written."""

    EXAMPLES: ClassVar = {
        "all": "megatron-prune plan --load ckpt/dense --save plan.json --scores scores --ratio 0.25",
        "shape": "--hidden-size-remain 512 --drop-layers 7,13, or a budget: --params 90M --multiple-of hidden=64,ffn=128",
        "how": "--metric obs:damping=0.1",
    }

    load: str = option(
        "Megatron checkpoint (its root, or an iteration directory), Hugging Face directory, or hub id",
        group="model",
        positional=True,
    )
    save: str = option("plan to write: a JSON file", group="model")
    tokenizer: str | None = option("Hugging Face directory of the tokenizer (default: the model's own)", None, group="model")
