"""What ``verify`` can be asked."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from megatron_prune.config import option
from megatron_prune.opening.options import ForeignOptions
from megatron_prune.runtime.options import LayoutOptions


@dataclass(frozen=True, kw_only=True)
class VerifyOptions(ForeignOptions, LayoutOptions):
    """Compare logits of a Megatron checkpoint, running under TP × PP, with those of a Hugging Face model."""

    EXAMPLES: ClassVar = {"all": "torchrun --nproc-per-node 3 -m megatron_prune verify --load ckpt/dense --hf-dir model"}

    load: str = option(
        "Megatron checkpoint: its root, or an iteration directory",
        group="model",
        exists=True,
        former=("load_dir",),
        positional=True,
    )
    hf_dir: str = option("Hugging Face model: a directory, or a hub id", group="model")
    text: str | None = option("text file to compare on (default: a built-in sentence)", None, group="text", exists=True)
    seq_length: int = option("tokens of it to compare on, at most", 128, least=1, group="text")
    tolerance: float = option("largest allowed difference of a logit; both sides compute in float32", 1e-3, least=0)
