"""A tokenizer: loaded when it is first needed, and known again by its vocabulary."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import torch

from megatron_prune.errors import InputError
from megatron_prune.files.documents import read_json, shorten


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
        InputError: if it cannot be loaded, or only by running code of its own.
    """
    from transformers import AutoTokenizer

    check_no_code(folder)
    try:
        return AutoTokenizer.from_pretrained(folder, trust_remote_code=False, local_files_only=True)
    except BaseException as error:  # tokenizers raises bare Exception for a damaged file, and its panics are not even that
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
            raise
        got = shorten(str(error).strip().split("\n")[0], 300)
        raise InputError(f"the tokenizer in {folder} cannot be read", got=got) from None


def check_no_code(folder: Path) -> None:
    """Refuse a tokenizer that wants code of its own: its text → tokens may be another than that of the class which stands in.

    Raises:
        InputError: naming the file and the code.
    """
    for name in ("tokenizer_config.json", "config.json"):
        wanted = read_json(folder / name).get("auto_map") if (folder / name).is_file() else None
        if isinstance(wanted, dict):
            wanted = wanted.get("AutoTokenizer")
        if wanted:
            raise InputError(
                f"{folder / name}: the tokenizer wants code of its own, which is never run",
                got=f"auto_map {shorten(wanted)}",
                do="name a tokenizer that needs none (--tokenizer); or take auto_map out of the file, if a class of transformers "
                "does the same",
            )


def tokenizer_digest(tokenizer: Any) -> str:
    """sha256 of the vocabulary, added tokens with it: the same for tokenizers whose ids mean the same tokens."""
    vocabulary = sorted(tokenizer.get_vocab().items())
    return hashlib.sha256(json.dumps(vocabulary, ensure_ascii=False).encode("utf-8", "surrogatepass")).hexdigest()
