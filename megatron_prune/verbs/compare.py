"""What ``compare`` can be asked."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from megatron_prune.config import option


@dataclass(frozen=True, kw_only=True)
class CompareOptions:
    """Print a before/after table of two Hugging Face models, with a sample generation of each by stock transformers."""

    EXAMPLES: ClassVar = {"all": "megatron-prune compare model pruned_hf"}

    before: str = option("Hugging Face model: a directory, or a hub id", group="model", positional=True)
    after: str = option("Hugging Face model: a directory, or a hub id", group="model", positional=True)
    before_evaluation: str | None = option("JSON file of `evaluate --output` for the first", None, group="model", exists=True)
    after_evaluation: str | None = option("JSON file of `evaluate --output` for the second", None, group="model", exists=True)
    prompt: str = option(
        "what both answer, as a turn of a user (without a chat template: continue)",
        "What is the capital of France?",
        group="text",
    )
    max_new_tokens: int = option("tokens of the answer", 24, least=1, group="text")
    output: str | None = option("also write the table to this JSON file", None, group="model")
