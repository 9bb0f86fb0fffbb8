"""Counting the tokens of a corpus of any size, on all cores; a stopped run goes on."""

from __future__ import annotations

import json
import time
from dataclasses import dataclass
from itertools import chain, islice
from pathlib import Path
from typing import Callable, Iterator, Sequence

import numpy

from megatron_prune.errors import CheckpointError, InputError
from megatron_prune.files import staging
from megatron_prune.files.documents import parse_json, read_bytes
from megatron_prune.text.documents import DocumentReader
from megatron_prune.text.pair import open_pair
from megatron_prune.text.parts import grouped
from megatron_prune.text.workers import in_processes
from megatron_prune.vocabulary.counts import Amount
from megatron_prune.vocabulary.vocabulary import Vocabulary, open_vocabulary

_PART = 1 << 21
"""Bytes of text that a process counts together."""

_BATCH = 1 << 17
"""Characters that are tokenised together: what their tokens take in memory stays in the processor's cache."""

_KEEP_EVERY = 10.0
"""Seconds between two states that are kept."""


@dataclass(eq=False)
class Tally:
    """What was counted of one corpus so far.

    Attributes:
        table: int64 [rows], occurrences by id.
        parts: how many parts of it were counted.
        documents, size: how many documents; bytes of the source.
    """

    table: numpy.ndarray
    parts: int = 0
    documents: int = 0
    size: int = 0

    def save(self, file: Path) -> None:
        """Keep it, atomically."""
        facts = [self.parts, self.documents, self.size]
        staging.write_bytes(file, json.dumps(facts).encode() + b"\n" + self.table.tobytes())

    @classmethod
    def kept(cls, file: Path, rows: int) -> Tally:
        """What was kept in ``file``; of nothing, where there is none, or it is damaged."""
        facts, _, table = read_bytes(file).partition(b"\n") if file.is_file() else (b"", b"", b"")
        try:
            parts, documents, size = parse_json(facts, tuple[Amount, Amount, Amount], file)
        except CheckpointError:
            return cls(numpy.zeros(rows, dtype=numpy.int64))
        if len(table) != 8 * rows:
            return cls(numpy.zeros(rows, dtype=numpy.int64))
        return cls(numpy.frombuffer(table, dtype=numpy.int64).copy(), parts, documents, size)


def count_documents(
    source: DocumentReader, field: str, vocabulary: Vocabulary, state: Path, *, workers: int, progress: Callable[[int], None]
) -> Tally:
    """Count a corpus of texts, going on from ``state``.

    Args:
        field: of the text, in records.
        progress: called with bytes of the source.

    Raises:
        InputError: if the corpus cannot be read.
        PruneError: if a worker was ended from outside.
    """
    found = Tally.kept(state, vocabulary.rows)
    progress(found.size)
    groups = islice(grouped(source.documents((field,)), lambda document: document.size, _PART), found.parts, None)
    sizes: list[tuple[int, int]] = []

    def texts() -> Iterator[list[str]]:
        for group in groups:
            sizes.append((len(group), sum(document.size for document in group)))
            yield [document.texts[0] for document in group]

    given = (vocabulary.folder, vocabulary.rows)
    kept = time.monotonic()
    for table in in_processes(texts(), _count, workers=workers, begin=_begin_worker, given=given):
        documents, size = sizes.pop(0)
        found.table += table
        found.parts, found.documents, found.size = found.parts + 1, found.documents + documents, found.size + size
        progress(size)
        if time.monotonic() - kept > _KEEP_EVERY:
            found.save(state)
            kept = time.monotonic()
    found.save(state)
    return found


def count_pair(prefix: str, rows: int, progress: Callable[[int], None]) -> Tally:
    """Count a Megatron ``.bin``/``.idx`` pair, every token of it once.

    Raises:
        InputError: if it is damaged, or holds an id that the vocabulary has not.
    """
    pair, found = open_pair(prefix), Tally(numpy.zeros(rows, dtype=numpy.int64))
    found.documents = pair.documents
    for block in pair.blocks():
        lowest, highest = int(block.min()), int(block.max())
        if lowest < 0 or highest >= rows:
            raise InputError(
                f"{prefix}.bin was not made with this tokenizer",
                got=f"token {highest if highest >= rows else lowest}",
                needed=f"0 to {rows - 1}",
            )
        found.table += numpy.bincount(block, minlength=rows)
        found.size += block.nbytes
        progress(block.nbytes)
    return found


_vocabulary: Vocabulary
"""What a worker reads once."""


def _begin_worker(folder: Path, rows: int) -> None:
    global _vocabulary
    _vocabulary = open_vocabulary(folder, rows)


def _count(texts: Sequence[str]) -> numpy.ndarray:
    return count_texts(texts, _vocabulary)


def count_texts(texts: Sequence[str], vocabulary: Vocabulary) -> numpy.ndarray:
    """int64 [rows]: occurrences of every token in the texts."""
    table = numpy.zeros(vocabulary.rows, dtype=numpy.int64)
    for batch in grouped(texts, len, _BATCH):
        found = vocabulary.encode(batch)
        total = sum(map(len, found))
        table += numpy.bincount(numpy.fromiter(chain.from_iterable(found), numpy.int64, total), minlength=vocabulary.rows)
    return table
