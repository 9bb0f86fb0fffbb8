"""Text that a small tokenizer cuts into many different tokens."""

from __future__ import annotations

import random


def words(count: int, seed: int = 0) -> str:
    """``count`` random words of one to seven letters."""
    generator = random.Random(seed)
    return " ".join("".join(generator.choices("abcdefghij", k=generator.randint(1, 7))) for _ in range(count))
