"""What ``vocab trim`` can be asked."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from megatron_prune.checkpoint.options import FORMATS
from megatron_prune.config import option
from megatron_prune.pruning.options import CalibrationOptions
from megatron_prune.vocabulary.options import SelectOptions
from megatron_prune.writing.options import OutputOptions, PushOptions


@dataclass(frozen=True, kw_only=True)
class VocabTrimOptions(CalibrationOptions, SelectOptions, OutputOptions, PushOptions):
    """Cut the vocabulary of a Hugging Face model, a Megatron checkpoint at its own TP × PP, or a tokenizer alone."""

    EXAMPLES: ClassVar = {
        "all": "megatron-prune vocab trim --load model --counts counts --remain-vocab-size 24576 --save small",
        "shape": "--coverage 0.9999 --keep-script Han,Latin --multiple-of 128",
    }

    save: str = option("directory to write: of the same kind", group="model", former=("save_dir",))
    plan: str | None = option("keep the tokens of this plan (of megatron-prune vocab select)", None, group="shape", exists=True)
    fold: bool = option(
        "fit the head's rows on text (--data …) to take over what dropped tokens said (default: rows stay as they are)", False
    )
    tokenizer_only: bool = option("write the tokenizer alone, no weights", False)
    ckpt_format: str | None = option(
        "layout of a Megatron result (default: that of the source)", None, choices=FORMATS, group="expert"
    )
    max_shard_size: str = option("split weight files of a Hugging Face result larger than this", "5GB", group="expert")
