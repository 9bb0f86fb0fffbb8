"""What ``convert`` can be asked."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from megatron_prune.checkpoint.options import FORMATS, TRANSFORMER_IMPLS
from megatron_prune.config import option
from megatron_prune.runtime.options import DTYPES
from megatron_prune.writing.options import OutputOptions


@dataclass(frozen=True, kw_only=True)
class ConvertOptions(OutputOptions):
    """Turn a Hugging Face model into a Megatron checkpoint."""

    EXAMPLES: ClassVar = {
        "all": "megatron-prune convert --load HuggingFaceTB/SmolLM2-135M-Instruct --save ckpt/dense --target-tensor-parallel-size 3",
    }

    load: str = option("Hugging Face model: a directory, or a hub id", group="model", former=("load_dir",), positional=True)
    save: str = option("Megatron checkpoint to write", group="model", former=("save_dir",))
    target_tensor_parallel_size: int = option("tensor-parallel ranks it is written for", 1, least=1)
    target_pipeline_parallel_size: int = option("pipeline stages it is written for", 1, least=1)
    target_params_dtype: str | None = option("element type (default: as stored)", None, choices=DTYPES)
    ckpt_format: str = option("checkpoint layout", "torch_dist", choices=FORMATS)
    transformer_impl: str = option(
        "whose modules Megatron-LM is to load it into; torch_dist suits both",
        TRANSFORMER_IMPLS[0],
        choices=TRANSFORMER_IMPLS,
        group="expert",
    )
    make_vocab_size_divisible_by: int = option(
        "the padded vocabulary is a multiple of this × the tensor-parallel size", 128, least=1, group="expert"
    )
