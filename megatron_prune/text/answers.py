"""Which tokens of a Megatron pair the assistant says: a second pair beside it, ``PREFIX_mask``, of as many values 0 and 1 (uint8)."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path

import numpy

from megatron_prune.errors import InputError
from megatron_prune.text.pair import Pair, open_pair, read_record


def mask_prefix(prefix: str | Path) -> Path:
    """Of the mask that belongs to a pair."""
    path = Path(prefix)
    return path.with_name(f"{path.name}_mask")


def has_mask(prefix: str | Path) -> bool:
    """Whether there is one."""
    return os.path.isfile(f"{mask_prefix(prefix)}.idx")


def open_mask(pair: Pair) -> Pair:
    """The mask of a pair, read once and checked against it.

    Raises:
        InputError: if there is none, or it is not this pair's, or it counts nothing.
    """
    again = "make both again: megatron-prune preprocess --answers-only"
    recorded = _recorded_digest(pair.prefix)
    if not has_mask(pair.prefix) or recorded == "":
        raise InputError(f"{pair.prefix} does not say which of its tokens are answers", needed="a mask beside it", do=again)
    mask = open_pair(mask_prefix(pair.prefix))
    alike = numpy.array_equal(mask.ends, pair.ends) and numpy.array_equal(mask.document_indices, pair.document_indices)
    if mask.dtype != numpy.uint8 or not alike:
        raise InputError(
            f"{mask.prefix} is not the mask of {pair.prefix}",
            got=f"{mask.documents} documents, {mask.total} values of {mask.dtype}",
            needed=f"{pair.documents} documents, {pair.total} values of uint8, each document as long",
            do=again,
        )
    counted, highest, digest = 0, 0, hashlib.sha256()
    for block in mask.blocks():
        counted, highest = counted + int(numpy.count_nonzero(block)), max(highest, int(block.max()))
        digest.update(block.tobytes())
    if highest > 1 or (recorded and recorded != digest.hexdigest()):
        got = f"a value {highest}" if highest > 1 else "another digest"
        raise InputError(f"{mask.prefix} is not the mask of {pair.prefix}", got=got, needed="what its record says", do=again)
    if not counted:
        raise InputError(f"{mask.prefix} marks no token as an answer", needed="some to train on")
    return mask


def _recorded_digest(prefix: str) -> str | None:
    """Of the mask, as the record beside the pair has it; empty if it says there is none, ``None`` without a record."""
    record = read_record(prefix)
    return record.get("answers", {"digest": ""})["digest"] if record else None
