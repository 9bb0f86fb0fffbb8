"""What ``preprocess`` can be asked."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from megatron_prune.config import option
from megatron_prune.text.splits import TRAIN


@dataclass(frozen=True, kw_only=True)
class PreprocessOptions:
    """Tokenise text for training: PREFIX_KEY_document.bin and .idx, as Megatron-LM reads them, for every key."""

    EXAMPLES: ClassVar = {
        "all": "megatron-prune preprocess --input corpus.jsonl notes/ --tokenizer ckpt/pruned --save data/corpus"
    }

    input: tuple[str, ...] = option(
        "text, JSON lines, JSON and Parquet files (text also .gz .bz2 .xz .zst), folders, owner/name on the Hugging Face hub, "
        "known data sets (wikitext2, c4 …); records may hold talks",
        group="text",
    )
    save: str = option("start of the names of the files to write", group="model", former=("output_prefix",))
    tokenizer: str = option("Hugging Face directory or hub id, or a Megatron checkpoint that keeps a tokenizer", group="model")
    json_keys: tuple[str, ...] = option(
        "names of the texts (or talks) in records; a pair of files for each", ("text",), group="text"
    )
    answers_only: bool = option("also mark which tokens of talks the assistant says, for recover --answers-only", False)
    append_eod: bool | None = option("end every document with the tokenizer's end-of-text token (default: yes)", True)
    tokenizer_hf_include_special_tokens: bool = option("keep what the tokenizer itself puts around a text (Llama: BOS)", False)
    workers: int | None = option("processes that tokenise (default: the cores that may be used)", None, least=1, group="run")
    split: str = option("split of data sets", TRAIN, group="text")
    overwrite: bool = option("replace existing files", False, group="run")
