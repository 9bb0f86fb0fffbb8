"""Windows out of a run of tokens: where they start. One rule for files, one for the published data sets."""

from __future__ import annotations

import random

import torch

from megatron_prune.errors import InputError


def random_starts(available: int, *, seq_length: int, count: int, seed: int) -> torch.Tensor:
    """int64 [count]: starts in 0 … available − seq_length − 1, by torch's generator (the quality protocol's draw).

    Where a single window is all there is, it starts at 0.
    """
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, max(1, available - seq_length), (count,), generator=generator)


def published_starts(available: int, *, seq_length: int, count: int, seed: int) -> torch.Tensor:
    """int64 [count]: the same range, drawn as the code of GPTQ, SparseGPT, Wanda and S0 does: by Python's generator."""
    generator = random.Random(seed)
    return torch.tensor([generator.randint(0, max(0, available - seq_length - 1)) for _ in range(count)], dtype=torch.int64)


def windows_at(tokens: torch.Tensor, starts: torch.Tensor, seq_length: int) -> torch.Tensor:
    """int64 [starts, seq_length]: the windows of ``tokens`` [n] that begin at ``starts``."""
    return tokens[starts[:, None] + torch.arange(seq_length)]


def check_enough(what: str, available: int, *, seq_length: int, count: int) -> None:
    """Refuse a source that holds fewer tokens than are asked for.

    Raises:
        InputError: naming what it holds and what was needed.
    """
    if available < count * seq_length:
        raise InputError(
            f"{what} holds fewer tokens than asked for",
            got=f"{available} tokens",
            needed=f"{count * seq_length} tokens ({count} samples of {seq_length})",
            do="give more text, or ask for fewer or shorter samples (--nsamples, --seq-length)",
        )


def whole_windows(what: str, available: int, *, seq_length: int, count: int) -> int:
    """How many windows from the start on there are, at most ``count``.

    Raises:
        InputError: if there is not one.
    """
    if available < seq_length:
        raise InputError(f"{what} is too short", got=f"{available} tokens", needed=f"at least {seq_length}")
    return min(count, available // seq_length)


def pad(rows: list[torch.Tensor], seq_length: int) -> tuple[torch.Tensor, torch.Tensor]:
    """(int64 [rows, seq_length] cut and right-padded with 0, int64 [rows] real lengths)."""
    tokens = torch.zeros(len(rows), seq_length, dtype=torch.int64)
    lengths = torch.tensor([min(len(row), seq_length) for row in rows], dtype=torch.int64)
    for row, (data, length) in enumerate(zip(rows, lengths.tolist())):
        tokens[row, :length] = data[:length]
    return tokens, lengths
