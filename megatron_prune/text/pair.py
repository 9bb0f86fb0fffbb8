"""A Megatron ``.bin``/``.idx`` pair, checked before anything is read from it."""

from __future__ import annotations

import os
import struct
from pathlib import Path
from typing import Any, Iterator, Literal

import numpy
import torch
from typing_extensions import NotRequired, TypedDict

from megatron_prune.errors import InputError, reason
from megatron_prune.files import staging
from megatron_prune.files.documents import open_regular, parse_json, read_bytes

_HEADER = b"MMIDIDX\x00\x00"
_START = struct.Struct("<9sQBQQ")
"""Header, version, code of the dtype, sequences, documents; then int32 lengths, int64 pointers, int64 documents."""

_BLOCK = 1 << 22
"""Tokens that are looked at together."""


def is_index(file: Path) -> bool:
    """Whether a file begins as the index of a Megatron data set."""
    try:
        with open_regular(file) as data:
            return data.read(len(_HEADER)) == _HEADER
    except (InputError, OSError):
        return False


def open_pair(prefix: str | Path) -> Pair:
    """The pair ``prefix.bin`` and ``prefix.idx``; only the index is read.

    A run that was stopped while it put the pair in place is completed first.

    Args:
        prefix: of both files; the name of either of them will do.

    Raises:
        InputError: naming the file that is missing, is no index, is damaged or not whole, holds something else than token
            ids, or holds none.
    """
    path = Path(prefix)
    whole = str(path.with_suffix("") if path.suffix in (".bin", ".idx") else path)
    if not os.path.lexists(f"{whole}.idx"):
        staging.settle(Path(f"{whole}.idx"))
    return Pair(whole)


class Pair:
    """An opened pair: its sequences, in the order of the index, are one run of tokens.

    Attributes:
        prefix: of both files.
        dtype: of a token in the file.
        sequences: how many there are.
        documents: how many there are; a document is one sequence or several.
        total: tokens in all sequences, at least 1.
        ends: int64 [sequences], where in that run each ends.
        document_indices: int64 [documents + 1], the sequences that documents begin with, and their number.
    """

    def __init__(self, prefix: str):
        _check(prefix)
        from megatron.core.datasets.indexed_dataset import IndexedDataset

        try:
            self._data = IndexedDataset(prefix, mmap=False)
            lengths = numpy.array(self._data.sequence_lengths, dtype=numpy.int64)
            ends = numpy.array(self._data.document_indices)
            self._pointers = numpy.array(self._data.index.sequence_pointers)
            self.dtype = numpy.dtype(self._data.index.dtype)
        except (AssertionError, ValueError, OSError, IndexError, KeyError, TypeError, OverflowError) as error:
            raise InputError(f"{prefix}.idx is damaged", got=reason(error), do="make the pair again") from None
        self.prefix, self.sequences, self.documents = prefix, len(lengths), len(ends) - 1
        if not numpy.issubdtype(self.dtype, numpy.integer):
            raise InputError(f"{prefix}.idx", got=f"values of {self.dtype}", needed="token ids (integers)")
        if (lengths < 0).any() or (self._pointers < 0).any() or not _ascends(ends, len(lengths)):
            raise InputError(
                f"{prefix}.idx is damaged",
                got="lengths, places or documents that cannot be",
                needed="lengths and places from 0 on, and documents that end after those before them",
                do="make the pair again",
            )
        held = Path(f"{prefix}.bin").stat().st_size
        reach = self._pointers.astype(numpy.uint64) + (lengths * self.dtype.itemsize).astype(numpy.uint64)  # below 2^64
        needed = max(int(reach.max()), int(lengths.sum()) * self.dtype.itemsize) if len(lengths) else 0  # none lie on each other
        if held < needed:
            raise InputError(f"{prefix}.bin is not whole", got=f"{held} bytes", needed=f"{needed} bytes, as {prefix}.idx says")
        self.ends = numpy.cumsum(lengths)
        self.document_indices = ends
        self.total = int(self.ends[-1]) if len(lengths) else 0
        if self.total == 0:
            raise InputError(f"{prefix}.bin is empty", got="no tokens", needed="at least one document")

    def window(self, start: int, length: int) -> torch.Tensor:
        """int64 [length]: tokens ``start`` … of the run, read from the sequences that hold them."""
        pieces, position, stop = [], start, start + length
        number = int(numpy.searchsorted(self.ends, start, side="right"))
        while position < stop:
            first = int(self.ends[number - 1]) if number else 0
            take = min(stop, int(self.ends[number])) - position
            if take:
                pieces.append(self._data.get(number, offset=position - first, length=take).astype(numpy.int64))
            position, number = position + take, number + 1
        return torch.from_numpy(numpy.concatenate(pieces))

    def extremes(self) -> tuple[int, int]:
        """The lowest and the highest token id; every token is read, a block at a time."""
        found = [(int(block.min()), int(block.max())) for block in self.blocks()]
        return min(low for low, _ in found), max(high for _, high in found)

    def highest(self) -> int:
        """The highest token id: what a vocabulary must be larger than."""
        return self.extremes()[1]

    def blocks(self) -> Iterator[numpy.ndarray]:
        """The run of tokens, every one once, [at most ``_BLOCK``] of ``dtype``: sequences that touch in the file are read together."""
        size = self.dtype.itemsize
        stops = self._pointers + numpy.diff(self.ends, prepend=0) * size
        breaks = numpy.flatnonzero(self._pointers[1:] != stops[:-1])
        starts, stops = self._pointers[numpy.append(0, breaks + 1)], stops[numpy.append(breaks, len(stops) - 1)]
        with open(f"{self.prefix}.bin", "rb") as file:
            for start, stop in zip(starts.tolist(), stops.tolist()):
                file.seek(start)
                for place in range(start, stop, _BLOCK * size):
                    yield numpy.frombuffer(file.read(min(_BLOCK * size, stop - place)), dtype=self.dtype)


def _ascends(ends: numpy.ndarray, sequences: int) -> bool:
    return len(ends) > 0 and ends[0] == 0 and bool((numpy.diff(ends) >= 0).all()) and ends[-1] <= sequences


class RecordedTokenizer(TypedDict):
    """What a record beside a pair says of the tokenizer that made it."""

    name: str
    vocab_size: int
    eod: int | None
    digest: str


class RecordedAnswers(TypedDict):
    """What a record says of the mask of answers beside its pair."""

    digest: str


class PairRecord(TypedDict):
    """The record that ``megatron-prune preprocess`` writes beside a pair, ``PREFIX.json``."""

    __pydantic_config__ = {"extra": "allow"}
    format: Literal["megatron-prune documents"]
    tokenizer: RecordedTokenizer
    answers: NotRequired[RecordedAnswers]


def read_record(prefix: str) -> PairRecord | None:
    """The record beside a pair; ``None`` where there is none, or a file of that name that is something else.

    Raises:
        InputError: if it is damaged.
    """
    file = Path(f"{prefix}.json")
    if not file.is_file():
        return None
    text = read_bytes(file, error=InputError)
    if b'"megatron-prune documents"' not in text[: 1 << 12]:
        return None
    return parse_json(text, PairRecord, file, error=InputError, do="make the pair again, or remove the record")


def recorded_tokenizer(prefix: str) -> RecordedTokenizer | None:
    """The tokenizer that the record beside a pair names; ``None`` without one."""
    record = read_record(prefix)
    return record["tokenizer"] if record else None


def _check(prefix: str) -> None:
    """Refuse what megatron-core would fail on with an assertion.

    Raises:
        InputError: naming the file that is missing or is no index.
    """
    for file in (Path(f"{prefix}.bin"), Path(f"{prefix}.idx")):
        if not file.is_file():
            raise InputError(f"there is no file {file}", needed=f"both {prefix}.bin and {prefix}.idx")
    with open_regular(Path(f"{prefix}.idx"), error=InputError) as file:
        start = file.read(_START.size)
        size = os.fstat(file.fileno()).st_size
    if not start.startswith(_HEADER):
        raise InputError(f"{prefix}.idx is not the index of a Megatron data set", got=start[:9], needed=_HEADER)
    if len(start) < _START.size:
        raise InputError(f"{prefix}.idx is damaged", got=f"{size} bytes", do="make the pair again")
    _, version, _, sequences, documents = _START.unpack(start)
    needed = _START.size + 12 * sequences + 8 * documents
    if version != 1 or size < needed:
        raise InputError(
            f"{prefix}.idx is damaged",
            got=f"version {version}, {size} bytes",
            needed=f"version 1, at least {needed} bytes",
            do="make the pair again",
        )


def numpy_dtype(vocab_size: int) -> Any:
    """numpy's type of a token in Megatron's files."""
    from megatron.core.datasets.indexed_dataset import DType

    return DType.optimal_dtype(vocab_size)
