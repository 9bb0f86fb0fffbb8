"""A tokenizer: loaded when it is first needed, and known again by its vocabulary."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import torch

from megatron_prune.errors import InputError


class Encoder:
    """Text → tokens by a Hugging Face tokenizer, with the special tokens it puts around a text by itself.

    Args:
        folder: directory of the tokenizer; ``None`` where there is none, which is an error only when text has to be read.
    """

    def __init__(self, folder: Path | None):
        self._folder = folder
        self._tokenizer = None

    def __call__(self, text: str) -> torch.Tensor:
        """int64 [tokens].

        Raises:
            InputError: if there is no tokenizer or it cannot be loaded.
        """
        self.load()
        return torch.tensor(self._tokenizer(text, verbose=False)["input_ids"], dtype=torch.int64)

    def load(self) -> None:
        """Load the tokenizer now.

        Raises:
            InputError: if there is no tokenizer or it cannot be loaded.
        """
        if self._tokenizer is not None:
            return
        if self._folder is None:
            raise InputError("text needs a tokenizer and the model keeps none", do="name a directory with --tokenizer")
        self._tokenizer = load_tokenizer(self._folder)


def load_tokenizer(folder: Path) -> Any:
    """The tokenizer of a Hugging Face directory, as ``transformers`` gives it.

    Raises:
        InputError: if it cannot be loaded.
    """
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(folder)
    except Exception as error:  # tokenizers raises bare Exception for a damaged file
        raise InputError(f"the tokenizer in {folder} cannot be read", got=str(error).split("\n")[0]) from None


def tokenizer_digest(tokenizer: Any) -> str:
    """sha256 of the vocabulary, added tokens with it: the same for tokenizers whose ids mean the same tokens."""
    vocabulary = sorted(tokenizer.get_vocab().items())
    return hashlib.sha256(json.dumps(vocabulary, ensure_ascii=False).encode("utf-8", "surrogatepass")).hexdigest()
