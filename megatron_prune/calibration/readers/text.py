"""A text file, tokenised whole; windows start where the quality protocol's draw says."""

from __future__ import annotations

import contextlib
import functools
import gzip
import os
import zlib
from pathlib import Path
from typing import IO, Any, Iterator, Sequence

from megatron_prune.calibration.documents import LONGEST, Document, DocumentReader, plain_documents
from megatron_prune.calibration.reader import READERS, TextReader
from megatron_prune.errors import InputError

COMPRESSED = ".gz"


class FileReader(TextReader, DocumentReader):
    """A file that is text, or whose lines are."""

    def size(self) -> int | None:
        return None if self.name.endswith(COMPRESSED) else os.path.getsize(self.name)


@READERS.register(".txt")
class TextFile(FileReader):
    """UTF-8 text, as it stands. Files with endings nobody knows are read as text too."""

    def text(self) -> tuple[str, dict[str, Any]]:
        with opened(Path(self.name), "rt") as file:
            return file.read(), {"split": None}

    def documents(self, keys: Sequence[str]) -> Iterator[Document]:
        return plain_documents(self, self._blocks(), keys)

    def _blocks(self) -> Iterator[str]:
        with opened(Path(self.name), "rt") as file:
            yield from iter(functools.partial(file.read, LONGEST), "")


@contextlib.contextmanager
def opened(file: Path, mode: str) -> Iterator[IO]:
    """A file that is read as UTF-8 text (``rt``, line ends as Python reads them) or as bytes (``rb``); ``.gz`` is unpacked.

    Raises:
        InputError: if, while it is open, it turns out that it cannot be read or is not UTF-8.
    """
    try:
        start = gzip.open if file.suffix == COMPRESSED else open
        with start(file, mode, encoding="utf-8" if mode == "rt" else None) as stream:
            yield stream
    except (OSError, EOFError, zlib.error, ValueError) as error:
        raise InputError(f"{file} cannot be read as text", got=str(error), needed="a UTF-8 text file") from None
