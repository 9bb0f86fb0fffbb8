"""What ``vocab count`` can be asked."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from megatron_prune.config import option
from megatron_prune.text.splits import TRAIN


@dataclass(frozen=True, kw_only=True)
class VocabCountOptions:
    """Count the tokens of corpora: text, JSON lines, Parquet, talks, folders, data sets, Megatron .bin/.idx pairs."""

    EXAMPLES: ClassVar = {"all": "megatron-prune vocab count --tokenizer model --input corpus.txt --save counts"}

    tokenizer: str = option("Hugging Face directory or hub id, or a Megatron checkpoint that keeps a tokenizer", group="model")
    input: tuple[str, ...] = option("corpora; each with :WEIGHT for its share (then all), else occurrences add up", group="text")
    save: str = option("file of counts to write (safetensors)", group="model", former=("output",))
    data_field: str = option("name of the text (or talk) in records", "text", group="text")
    split: str = option("split of data sets", TRAIN, group="text")
    workers: int | None = option("processes that tokenise (default: the cores that may be used)", None, least=1, group="run")
    text: str | None = option("also write a text file of lines 'id count', the most frequent first", None, group="model")
    overwrite: bool = option("replace an existing file", False, group="run")
