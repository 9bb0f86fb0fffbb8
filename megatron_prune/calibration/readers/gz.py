"""A compressed file: read as what its name says without ``.gz``."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from megatron_prune.calibration.reader import READERS, Reader
from megatron_prune.calibration.readers.text import COMPRESSED


@READERS.register(COMPRESSED)
def compressed(name: str, **options: Any) -> Reader:
    """``.jsonl.gz``, ``.json.gz``, ``.txt.gz``; what says nothing is text."""
    ending = Path(name).with_suffix("").suffix
    return READERS.get(ending if ending in (".jsonl", ".json") else ".txt")(name, **options)
