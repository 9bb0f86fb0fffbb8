"""A compressed file: read as what its name says without ``.gz``, ``.bz2``, ``.xz`` or ``.zst``."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from megatron_prune.errors import InputError
from megatron_prune.text.reader import READERS, Reader

INNER = (".txt", ".jsonl", ".ndjson", ".json", ".csv", ".tsv")
"""What is read while it is unpacked."""

_NOT_STREAMS = (".tar", ".parquet", ".arrow", ".safetensors", ".bin", ".idx")


@READERS.register(".gz")
@READERS.register(".bz2")
@READERS.register(".xz")
@READERS.register(".zst")
def compressed(name: str, **options: Any) -> Reader:
    """``.jsonl.gz``, ``.json.xz``, ``.txt.zst`` …; what says nothing is text."""
    ending = inner_ending(Path(name))
    if ending in _NOT_STREAMS:
        raise InputError(f"{name} is not read while it is packed", got=ending, do="unpack it, and name what comes out")
    return READERS.get(ending if ending in INNER else ".txt")(name, **options)


def inner_ending(file: Path) -> str:
    """``.jsonl`` of ``a.jsonl.gz``."""
    return file.with_suffix("").suffix.lower()
