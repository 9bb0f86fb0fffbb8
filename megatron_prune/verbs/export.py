"""What ``export`` can be asked."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from megatron_prune.config import option
from megatron_prune.opening.options import ForeignOptions
from megatron_prune.runtime.options import DTYPES
from megatron_prune.writing.options import CardOptions, HuggingFaceOptions, OutputOptions, PushOptions


@dataclass(frozen=True, kw_only=True)
class ExportOptions(ForeignOptions, OutputOptions, HuggingFaceOptions, PushOptions, CardOptions):
    """Turn a Megatron checkpoint into a Hugging Face model that stock transformers loads."""

    EXAMPLES: ClassVar = {"all": "megatron-prune export --load ckpt/pruned --save pruned_hf"}

    load: str = option(
        "Megatron checkpoint: its root, or an iteration directory",
        group="model",
        exists=True,
        former=("load_dir",),
        positional=True,
    )
    save: str = option("Hugging Face directory to write", group="model", former=("save_dir",))
    target_params_dtype: str | None = option(
        "element type (default: that of the Hugging Face model it came from)", None, choices=DTYPES
    )
    adapter_only: bool = option("write an adapter as a directory that peft loads, not merged", False)
    base: str | None = option(
        "Megatron checkpoint of the model that an adapter is merged into (default: where it was trained)", None, group="expert"
    )
