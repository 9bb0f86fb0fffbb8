"""Old ids and new ones: what renumbers anything that was tokenised before."""

from __future__ import annotations

import io
import math
from dataclasses import dataclass
from pathlib import Path
from zipfile import ZipFile

import numpy

from megatron_prune.errors import InputError, reason
from megatron_prune.files.documents import read_bytes
from megatron_prune.text.encoder import load_tokenizer, tokenizer_digest
from megatron_prune.vocabulary.vocabulary import Vocabulary

MAP_FILE = "vocab_map.npz"
"""Beside the tokenizer. Not safetensors: what serves models reads every file of that name as weights."""


@dataclass(frozen=True, kw_only=True, eq=False)
class IdMap:
    """Attributes:
    new_to_old: int64 [new rows], ascending.
    starts: int64 [old rows + 1], where an old id's new ids start in ``pieces``.
    pieces: int64: the new ids of old id i are ``pieces[starts[i]:starts[i + 1]]``; of a dropped token what its text falls
        into, of a row without a token none.
    tokenizer: digest of the whole tokenizer, as the record beside tokenised data has it; empty where it is not known.
    """

    new_to_old: numpy.ndarray
    starts: numpy.ndarray
    pieces: numpy.ndarray
    tokenizer: str = ""

    @classmethod
    def of(cls, vocabulary: Vocabulary, rows: numpy.ndarray) -> IdMap:
        """The map of a selection."""
        new_ids = {old: new for new, old in enumerate(rows.tolist())}
        split = vocabulary.splitter(new_ids)
        lists = [
            [new_ids[old]] if old in new_ids else [new_ids[part] for part in split(old)] if old in vocabulary.pieces else []
            for old in range(vocabulary.rows)
        ]
        starts = numpy.concatenate([[0], numpy.cumsum([len(found) for found in lists])])
        pieces = numpy.array([new for found in lists for new in found], dtype=numpy.int64)
        return cls(new_to_old=rows, starts=starts, pieces=pieces, tokenizer=_digest(vocabulary.folder))

    @property
    def old_to_new(self) -> numpy.ndarray:
        """int64 [old rows]: -1 for a dropped token."""
        found = numpy.full(len(self.starts) - 1, -1, dtype=numpy.int64)
        found[self.new_to_old] = numpy.arange(len(self.new_to_old))
        return found

    def apply(self, tokens: numpy.ndarray) -> tuple[numpy.ndarray, numpy.ndarray]:
        """Old ids → (new ids, int64 [old ids]: how many new ones there are up to and with each old one)."""
        counts = numpy.diff(self.starts)[tokens]
        ends = numpy.cumsum(counts)
        places = numpy.arange(ends[-1] if len(ends) else 0) - numpy.repeat(ends - counts, counts)
        return self.pieces[numpy.repeat(self.starts[tokens], counts) + places], ends

    def dumps(self) -> bytes:
        """The file. Beside the map it holds ``d2t`` (old id = new id + d2t) and ``t2d`` (whether an old id stays), by which
        servers take a trimmed model as the draft of the whole one (as EAGLE-3's, Li et al. 2025, arXiv 2503.01840)."""
        held = io.BytesIO()
        old_to_new = self.old_to_new
        numpy.savez_compressed(
            held,
            new_to_old=self.new_to_old,
            old_to_new=old_to_new,
            starts=self.starts,
            pieces=self.pieces,
            d2t=self.new_to_old - numpy.arange(len(self.new_to_old)),
            t2d=old_to_new >= 0,
            tokenizer=numpy.array(self.tokenizer),
        )
        return held.getvalue()


def _digest(folder: Path) -> str:
    try:
        return tokenizer_digest(load_tokenizer(folder))
    except InputError:  # of a kind that transformers does not load
        return ""


def load_map(path: Path) -> IdMap:
    """Read what :meth:`IdMap.dumps` gave; from a directory, its :data:`MAP_FILE`.

    Raises:
        InputError: if it is no such file, or damaged.
    """
    file = path / MAP_FILE if path.is_dir() else path
    do = f"name the {MAP_FILE} beside the trimmed tokenizer"
    try:
        found = _read(read_bytes(file, error=InputError))
    except Exception as error:  # zipfile, zlib and numpy raise dozens of kinds
        raise InputError(f"{file} is no map of a trimmed vocabulary", got=reason(error), do=do) from None
    sizes = numpy.diff(found.starts)
    whole = found.starts[0] == 0 and (sizes >= 0).all() and found.starts[-1] == len(found.pieces)
    inside = len(found.pieces) == 0 or 0 <= found.pieces.min() <= found.pieces.max() < len(found.new_to_old)
    ascending = found.new_to_old[0] >= 0 and (numpy.diff(found.new_to_old) > 0).all() and found.new_to_old[-1] < len(sizes)
    if not (whole and inside and ascending):
        raise InputError(f"{file} is no map of a trimmed vocabulary", got="a map that contradicts itself", do=do)
    return found


_ROWS = 1 << 26
"""Numbers that a table may hold: a vocabulary has a hundredth."""


def _read(content: bytes) -> IdMap:
    """The tables of the archive, each of which says its size before it is unpacked."""
    tables = {}
    with ZipFile(io.BytesIO(content)) as archive:
        for name, kind in (("new_to_old", "int64"), ("starts", "int64"), ("pieces", "int64"), ("tokenizer", "str")):
            with archive.open(f"{name}.npy") as member:
                version = numpy.lib.format.read_magic(member)
                if version != (1, 0):
                    raise ValueError(f"{name}: a table of format {version}")
                shape, _, dtype = numpy.lib.format.read_array_header_1_0(member)
                is_text = kind == "str" and dtype.kind == "U" and dtype.itemsize <= 4096 and shape == ()
                if not is_text and not (dtype == kind and len(shape) == 1 and shape[0] <= _ROWS):
                    raise ValueError(f"{name}: {dtype} {list(shape)}")
                size = dtype.itemsize * math.prod(shape)
                held = member.read(size)
                if len(held) != size:
                    raise ValueError(f"{name} ends early")
                tables[name] = numpy.frombuffer(held, dtype=dtype).reshape(shape)
    if not len(tables["new_to_old"]) or not len(tables["starts"]):
        raise ValueError("an empty map")
    return IdMap(**{**tables, "tokenizer": str(tables["tokenizer"])})
