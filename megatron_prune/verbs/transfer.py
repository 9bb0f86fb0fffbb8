"""What ``transfer`` can be asked."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from megatron_prune.checkpoint.options import FORMATS, TRANSFORMER_IMPLS
from megatron_prune.config import option
from megatron_prune.opening.options import ForeignOptions
from megatron_prune.runtime.options import DTYPES
from megatron_prune.writing.options import OutputOptions


@dataclass(frozen=True, kw_only=True)
class TransferOptions(ForeignOptions, OutputOptions):
    """Rewrite a Megatron checkpoint for another parallel layout, format or element type; merge an adapter."""

    EXAMPLES: ClassVar = {"all": "megatron-prune transfer --load ckpt/dense --save ckpt/tp8 --target-tensor-parallel-size 8"}

    load: str = option(
        "Megatron checkpoint: its root, or an iteration directory",
        group="model",
        exists=True,
        former=("load_dir",),
        positional=True,
    )
    save: str = option("Megatron checkpoint to write", group="model", former=("save_dir",))
    target_tensor_parallel_size: int = option("tensor-parallel ranks it is written for", 1, least=1)
    target_pipeline_parallel_size: int = option("pipeline stages it is written for", 1, least=1)
    target_params_dtype: str | None = option("element type (default: as stored)", None, choices=DTYPES)
    ckpt_format: str | None = option("checkpoint layout (default: that of the source)", None, choices=FORMATS)
    transformer_impl: str = option(
        "whose modules Megatron-LM is to load it into; torch_dist suits both",
        TRANSFORMER_IMPLS[0],
        choices=TRANSFORMER_IMPLS,
        group="expert",
    )
    make_vocab_size_divisible_by: int | None = option(
        "the padded vocabulary is a multiple of this × the tensor-parallel size (default: that of the source)",
        None,
        least=1,
        group="expert",
    )
    base: str | None = option(
        "Megatron checkpoint of the model that an adapter is merged into (default: where it was trained)", None, group="expert"
    )
