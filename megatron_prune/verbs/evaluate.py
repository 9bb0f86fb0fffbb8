"""What ``evaluate`` can be asked."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from megatron_prune.config import option
from megatron_prune.opening.options import ForeignOptions
from megatron_prune.runtime.options import DTYPES, LayoutOptions


@dataclass(frozen=True, kw_only=True)
class EvaluateOptions(ForeignOptions, LayoutOptions):
    """Measure perplexity of a Megatron checkpoint or a Hugging Face model on a text."""

    EXAMPLES: ClassVar = {"all": "megatron-prune evaluate pruned_hf --data held_out.txt"}

    load: str = option(
        "Megatron checkpoint (its root, or an iteration directory), Hugging Face directory, or hub id",
        group="model",
        former=("load_dir",),
        positional=True,
    )
    data: str = option(
        "text file, .jsonl file, folder, prefix of a Megatron .bin/.idx pair, owner/name on the Hugging Face hub, or a known "
        "data set (wikitext2, ptb, c4 …; its evaluation split)",
        group="text",
    )
    data_field: str = option("name of the text in JSONL and data sets", "text", group="text")
    tokenizer: str | None = option("Hugging Face directory of the tokenizer (default: the model's own)", None, group="model")
    seq_length: int | None = option(
        "tokens in a window (default: 512, or the model's context where that is shorter)", None, least=1, group="text"
    )
    windows: int = option("windows from the start of the text, at most", 16, least=1, group="text")
    micro_batch_size: int = option("windows in a forward pass", 1, least=1, group="run")
    dtype: str = option("what to compute in", "fp32", choices=DTYPES, group="run")
    output: str | None = option("also write the result to this JSON file", None, group="model")
    checkpoint: str | None = None  # what the result calls the model, if not by its place; no flag
    text: str | None = None  # and the text
