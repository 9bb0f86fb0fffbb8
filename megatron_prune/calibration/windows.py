"""A text file as windows of tokens."""

from __future__ import annotations

from pathlib import Path

import torch

from megatron_prune.errors import InputError


def read_windows(file: Path, tokenizer_dir: Path, *, seq_length: int, count: int) -> torch.Tensor:
    """The first ``count`` windows of a text, tokenised whole.

    Args:
        tokenizer_dir: Hugging Face directory whose tokenizer is used.
        seq_length: tokens in a window.

    Returns:
        int64 [windows, seq_length].

    Raises:
        InputError: if a file cannot be read or holds less than one window.
    """
    from transformers import AutoTokenizer

    try:
        text = file.read_text(encoding="utf-8")
        tokenizer = AutoTokenizer.from_pretrained(tokenizer_dir)
    except (OSError, ValueError) as error:
        raise InputError("text or tokenizer cannot be read", got=str(error).split("\n")[0]) from None
    tokens = torch.tensor(tokenizer(text, verbose=False)["input_ids"], dtype=torch.long)
    whole = min(count, len(tokens) // seq_length)
    if whole < 1:
        raise InputError(f"{file} is too short", got=f"{len(tokens)} tokens", needed=f"at least {seq_length}")
    return tokens[: whole * seq_length].view(whole, seq_length)
