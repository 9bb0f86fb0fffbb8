"""A Megatron ``.bin``/``.idx`` pair: already tokens, whatever tokenizer made them.

Its sequences, in the order of the index, are one run of tokens with nothing put between them (an end-of-document token is
there if whoever made the pair put it there); windows may span documents, as in Megatron's own GPT data set. Only the windows
that are drawn are read, so the pair may be larger than memory.
"""

from __future__ import annotations

import os
import struct
from pathlib import Path

import numpy
import torch

from megatron_prune.calibration.draw import check_enough, random_starts, whole_windows
from megatron_prune.calibration.reader import READERS, Drawn, Reader, full
from megatron_prune.errors import InputError

_HEADER = b"MMIDIDX\x00\x00"
_START = struct.Struct("<9sQBQQ")
"""Header, version, code of the dtype, sequences, documents; then int32 lengths, int64 pointers, int64 documents."""


@READERS.register(".bin")
@READERS.register(".idx")
class IndexedPair(Reader):
    """Named by its prefix, or by either file."""

    needs_tokenizer = False

    def draw(self, *, seq_length: int, count: int, seed: int) -> Drawn:
        pair = _Pair(self._prefix())
        check_enough(self.name, pair.total, seq_length=seq_length, count=count)
        starts = random_starts(pair.total, seq_length=seq_length, count=count, seed=seed)
        return full(torch.stack([pair.window(start, seq_length) for start in starts.tolist()]), {"split": None})

    def windows(self, *, seq_length: int, count: int) -> Drawn:
        pair = _Pair(self._prefix())
        whole = whole_windows(self.name, pair.total, seq_length=seq_length, count=count)
        return full(torch.stack([pair.window(number * seq_length, seq_length) for number in range(whole)]), {"split": None})

    def _prefix(self) -> str:
        return self.name[:-4] if Path(self.name).suffix in (".bin", ".idx") else self.name


class _Pair:
    """An opened pair.

    Attributes:
        total: tokens in all sequences.
    """

    def __init__(self, prefix: str):
        _check(prefix)
        from megatron.core.datasets.indexed_dataset import IndexedDataset

        try:
            self._data = IndexedDataset(prefix, mmap=False)
            lengths = numpy.array(self._data.sequence_lengths, dtype=numpy.int64)
            pointers = numpy.array(self._data.index.sequence_pointers)
            kind = numpy.dtype(self._data.index.dtype)
        except (AssertionError, ValueError, OSError) as error:
            raise InputError(f"{prefix}.idx is damaged", got=str(error), do="make the pair again") from None
        if not numpy.issubdtype(kind, numpy.integer):
            raise InputError(f"{prefix}.idx", got=f"values of {kind}", needed="token ids (integers)")
        held = Path(f"{prefix}.bin").stat().st_size
        needed = int((pointers + lengths * kind.itemsize).max()) if len(lengths) else 0
        if held < needed or (lengths < 0).any() or (pointers < 0).any():
            raise InputError(f"{prefix}.bin is not whole", got=f"{held} bytes", needed=f"{needed} bytes, as {prefix}.idx says")
        self._ends = numpy.cumsum(lengths)
        self.total = int(self._ends[-1]) if len(lengths) else 0

    def window(self, start: int, length: int) -> torch.Tensor:
        """int64 [length]: tokens ``start`` … of the run, read from the sequences that hold them."""
        pieces, position, stop = [], start, start + length
        number = int(numpy.searchsorted(self._ends, start, side="right"))
        while position < stop:
            first = int(self._ends[number - 1]) if number else 0
            take = min(stop, int(self._ends[number])) - position
            if take:
                pieces.append(self._data.get(number, offset=position - first, length=take).astype(numpy.int64))
            position, number = position + take, number + 1
        return torch.from_numpy(numpy.concatenate(pieces))


def _check(prefix: str) -> None:
    """Refuse what megatron-core would fail on with an assertion.

    Raises:
        InputError: naming the file that is missing or is no index.
    """
    for file in (Path(f"{prefix}.bin"), Path(f"{prefix}.idx")):
        if not file.is_file():
            raise InputError(f"there is no file {file}", needed=f"both {prefix}.bin and {prefix}.idx")
    try:
        with open(f"{prefix}.idx", "rb") as file:
            start = file.read(_START.size)
            size = os.fstat(file.fileno()).st_size
    except OSError as error:
        raise InputError(f"{prefix}.idx cannot be read", got=str(error)) from None
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
