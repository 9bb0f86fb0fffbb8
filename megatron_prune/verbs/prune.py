"""What ``prune`` can be asked."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, ClassVar

from megatron_prune.checkpoint.options import FORMATS, TRANSFORMER_IMPLS
from megatron_prune.config import option
from megatron_prune.opening.options import ForeignOptions
from megatron_prune.pruning.options import DivisionOptions, PruningOptions
from megatron_prune.runtime.megatron_flags import MegatronFlags
from megatron_prune.runtime.options import LayoutOptions


@dataclass(frozen=True, kw_only=True)
class PruneOptions(PruningOptions, DivisionOptions, ForeignOptions, LayoutOptions):
    """Prune a Megatron checkpoint to a smaller shape, by scores or by a plan, and re-fit what stays."""

    FOREIGN: ClassVar = MegatronFlags()
    EXAMPLES: ClassVar = {
        "all": "torchrun --nproc-per-node 3 -m megatron_prune prune --load ckpt/dense --save ckpt/pruned --ratio 0.25 --data text.txt",
        "shape": "--hidden-size-remain 512 --drop-layers 7,13, or a budget: --params 90M --multiple-of hidden=64,ffn=128",
        "text": "--data corpus.jsonl:0.7 wikitext2:0.3 --nsamples 64 --seq-length 256",
        "how": "--metric obs:damping=0.1 --reconstruct 0",
        "run": "--dtype bf16 --seed 7",
    }

    load: str = option("Megatron checkpoint: its root, or an iteration directory", group="model", exists=True, positional=True)
    save: str = option("pruned Megatron checkpoint to write", group="model")
    tokenizer: str | None = option(
        "Hugging Face directory of the tokenizer (default: kept in the checkpoint)", None, group="model"
    )
    ckpt_format: str | None = option("layout of the result (default: that of the source)", None, choices=FORMATS, group="model")
    transformer_impl: str = option(
        "whose modules Megatron-LM is to load it into; torch_dist suits both",
        TRANSFORMER_IMPLS[0],
        choices=TRANSFORMER_IMPLS,
        group="expert",
    )
    megatron: dict[str, Any] = field(default_factory=dict)
