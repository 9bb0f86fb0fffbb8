"""A Megatron ``.bin``/``.idx`` pair: already tokens, whatever tokenizer made them.

Its sequences, in the order of the index, are one run of tokens with nothing put between them (an end-of-document token is
there if whoever made the pair put it there); windows may span documents, as in Megatron's own GPT data set. Only the windows
that are drawn are read, so the pair may be larger than memory.
"""

from __future__ import annotations

from pathlib import Path

import torch

from megatron_prune.text.draw import check_enough, random_starts, whole_windows
from megatron_prune.text.pair import open_pair
from megatron_prune.text.reader import READERS, Drawn, Reader, full


@READERS.register(".bin")
@READERS.register(".idx")
class IndexedPair(Reader):
    """Named by its prefix, or by either file."""

    needs_tokenizer = False

    def files(self) -> list[Path]:
        return [Path(f"{open_pair(self.name).prefix}.bin")]

    def draw(self, *, seq_length: int, count: int, seed: int) -> Drawn:
        pair = open_pair(self.name)
        check_enough(self.name, pair.total, seq_length=seq_length, count=count)
        starts = random_starts(pair.total, seq_length=seq_length, count=count, seed=seed)
        return full(torch.stack([pair.window(start, seq_length) for start in starts.tolist()]), {"split": None})

    def windows(self, *, seq_length: int, count: int) -> Drawn:
        pair = open_pair(self.name)
        whole = whole_windows(self.name, pair.total, seq_length=seq_length, count=count)
        return full(torch.stack([pair.window(number * seq_length, seq_length) for number in range(whole)]), {"split": None})
