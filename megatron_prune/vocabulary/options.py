"""What the vocabulary's verbs are asked: the counts, which tokens are to stay, the texts of the report."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from megatron_prune.config import option
from megatron_prune.opening.options import ForeignOptions
from megatron_prune.serving.options import ServeOptions
from megatron_prune.vocabulary.selection import PRIOR


@dataclass(frozen=True, kw_only=True)
class SelectOptions(ForeignOptions, ServeOptions):
    """Which tokens stay."""

    load: str = option(
        "model: a Hugging Face directory or hub id, or a Megatron checkpoint; or a tokenizer alone",
        group="model",
        former=("load_dir",),
        positional=True,
    )
    tokenizer: str | None = option("directory of the tokenizer, for a model that keeps none", None, group="model")
    counts: tuple[str, ...] = option("files of megatron-prune vocab count, each with :WEIGHT if wanted", (), group="text")
    remain_vocab_size: int | None = option(
        "tokens that stay: the exact size, specials and bytes included", None, least=1, group="shape"
    )
    min_count: float | None = option(
        "keep tokens that the corpus makes at least this often, at any step of encoding", None, above=0, group="shape"
    )
    coverage: float | None = option(
        "keep as many tokens as this share of all occurrences takes, such as 0.9999", None, above=0, most=1, group="shape"
    )
    keep: str | None = option("file of texts, one a line, whose tokens all stay", None, group="shape", exists=True)
    keep_ids: str | None = option(
        "file of ids that all stay: a list or tensor of torch.save, or one number a line", None, group="shape", exists=True
    )
    keep_script: str | None = option("keep all tokens of these Unicode scripts, such as Han,Latin", None, group="shape")
    multiple_of: int | None = option(
        "round the size up to a multiple of this with further tokens (default: 1; where no exact size is asked for, what "
        "Megatron pads a checkpoint's vocabulary to)",
        None,
        least=1,
        group="shape",
    )
    prior: float = option("weight, 0 to 1, of what a tokenizer learnt early against the counts", PRIOR, least=0, most=1)
    held_out: tuple[str, ...] = option("texts that were not counted: the report says what becomes of them", (), group="text")
    data_field: str = option("name of the text in JSONL and data sets", "text", group="text")
    report: str | None = option("also write the report here, as JSON", None, group="model")
    save_ids: str | None = option(
        "also write the old ids that stay, in their new order: an int64 tensor of torch.save", None, group="model"
    )

    CRITERIA: ClassVar[tuple[str, ...]] = ("remain_vocab_size", "min_count", "coverage", "keep", "keep_ids", "keep_script")
