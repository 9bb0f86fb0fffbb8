"""What ``vocab remap`` can be asked."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from megatron_prune.config import option


@dataclass(frozen=True, kw_only=True)
class VocabRemapOptions:
    """Renumber tokenised data for a trimmed vocabulary. A dropped token becomes the tokens that its text falls into."""

    EXAMPLES: ClassVar = {"all": "megatron-prune vocab remap --input data/corpus_text_document --map small --save data/small"}

    input: str = option("prefix of the .bin/.idx pair", group="text")
    save: str = option("prefix of the pair to write", group="model", former=("output_prefix",))
    map: str = option(
        "the trimmed model (Hugging Face directory or Megatron checkpoint), or its vocab_map.npz", group="model", exists=True
    )
    overwrite: bool = option("replace existing files", False, group="run")
