"""C4, English, one shard: the calibration of SparseGPT, Wanda and Pruner-Zero.

Calibration: draw a document until one is longer than a sample, take a random window of it (the first shard of train).
Evaluation: the first 1,100 documents of validation joined with spaces.
"""

from __future__ import annotations

import random
from typing import Any, Iterator, Sequence

import torch

from megatron_prune.errors import InputError
from megatron_prune.text.documents import Document, DocumentReader
from megatron_prune.text.hub import Origin
from megatron_prune.text.reader import READERS, Drawn, TextReader, full
from megatron_prune.text.records import row_documents
from megatron_prune.text.splits import TEST, TRAIN

TRIES = 10_000
"""Documents looked at for one sample before giving up."""

EVALUATED = 1_100
"""Documents that make the text to evaluate on."""


@READERS.register("c4")
class C4(TextReader, DocumentReader):
    """``allenai/c4``, ``en``."""

    origin = Origin(
        id="allenai/c4",
        splits={TRAIN: "train", TEST: "validation"},
        options={
            "data_files": {
                "train": "en/c4-train.00000-of-01024.json.gz",
                "validation": "en/c4-validation.00000-of-00008.json.gz",
            },
            "verification_mode": "no_checks",  # two of its 1,032 files are not what its card counts
        },
    )

    def text(self) -> tuple[str, dict[str, Any]]:
        rows, facts = self.origin.rows(self.split)
        return " ".join(rows[number]["text"] for number in range(min(EVALUATED, len(rows)))), facts

    def documents(self, keys: Sequence[str]) -> Iterator[Document]:
        return row_documents(self.name, self.origin.rows(self.split)[0], keys, self.encode)

    def draw(self, *, seq_length: int, count: int, seed: int) -> Drawn:
        rows, facts = self.origin.rows(self.split)
        if len(rows) == 0:
            raise InputError(f"{self.name} is empty", needed="documents")
        generator = random.Random(seed)
        return full(torch.stack([self._sample(rows, generator, seq_length) for _ in range(count)]), facts)

    def _sample(self, rows: Any, generator: random.Random, seq_length: int) -> torch.Tensor:
        """int64 [seq_length]."""
        longest = 0
        for _ in range(TRIES):
            tokens = self.encode(rows[generator.randint(0, len(rows) - 1)]["text"])
            longest = max(longest, len(tokens))
            if len(tokens) > seq_length:
                start = generator.randint(0, len(tokens) - seq_length - 1)
                return tokens[start : start + seq_length]
        raise InputError(
            f"{self.name} has no document that is long enough, in {TRIES} draws",
            got=f"at most {longest} tokens",
            needed=f"more than {seq_length}",
            do="lower --seq-length",
        )
