"""Sources as streams of documents: what is tokenised for training.

A line of JSONL is a document, and so is a row of a data set. Plain text does not say where its documents end: a blank line
ends a paragraph there as often as a document. So a text is one document, and a long one is cut: behind a blank line where
there is one, else behind a line. Nothing is left out: the pieces are the text.
"""

from __future__ import annotations

import os
from abc import ABC, abstractmethod
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Iterable, Iterator, Sequence

from megatron_prune.errors import InputError
from megatron_prune.text.encoder import Encoder
from megatron_prune.text.reader import Reader, TextReader, open_reader
from megatron_prune.text.splits import TRAIN
from megatron_prune.text.streams import is_compressed
from megatron_prune.text.talks import Span

LONGEST = 1 << 14
"""Characters of plain text that are one document, at most: some 4,000 tokens."""

MOST = 1 << 29
"""Characters that are tokenised whole, at most; documents have no such limit."""


@dataclass(frozen=True, slots=True)
class Document:
    """One document.

    Attributes:
        texts: its text for each key.
        size: bytes of the source that it takes up.
        answers: for each text which characters the assistant says; ``None`` where the text is no talk.
    """

    texts: tuple[str, ...]
    size: int
    answers: tuple[list[Span] | None, ...] = ()

    def of(self, column: int) -> tuple[str, list[Span] | None]:
        """The text for a key, by its place, and the answers in it."""
        return self.texts[column], self.answers[column] if self.answers else None

    @property
    def is_talk(self) -> bool:
        """Whether the first text is one."""
        return bool(self.answers) and self.answers[0] is not None


class DocumentReader(ABC):
    """A reader whose documents can be streamed, so that the source may be larger than memory."""

    @abstractmethod
    def documents(self, keys: Sequence[str]) -> Iterator[Document]:
        """Every document, in order.

        Args:
            keys: names of the texts in a record; plain text takes one, whatever its name.

        Raises:
            InputError: if the source cannot be read or a record lacks a text; where it is reached.
        """

    def size(self) -> int | None:
        """Bytes that the documents take up together, if that is known beforehand."""
        return None

    def files(self) -> list[Path]:
        """The files here that are read."""
        return []

    def has_splits(self) -> bool:
        """Whether it is cut into splits, of which one is read."""
        return True

    def contents(self) -> dict[str, Any]:
        """JSON-able: of a folder, what is read of it and what is not (see ``contents.py``); else empty."""
        return {}


class FileReader(TextReader, DocumentReader):
    """A file that is text, or whose records are."""

    def files(self) -> list[Path]:
        return [Path(self.name)]

    def has_splits(self) -> bool:
        return False

    def size(self) -> int | None:
        return None if is_compressed(self.name) else os.path.getsize(self.name)


def open_documents(name: str, keys: Sequence[str], *, split: str, encode: Encoder | None = None) -> DocumentReader:
    """The source called ``name``.

    Args:
        encode: says what talks look like as text; where there is none, a talk is refused.

    Raises:
        InputError: if there is none, or it is not text.
    """
    reader = open_reader(name, encode=encode or Encoder(None), field=keys[0], split=split)
    if isinstance(reader, DocumentReader):
        return reader
    if isinstance(reader, TextReader):
        return _WholeText(reader)
    raise InputError(f"{name} is not text", got="tokens", needed="text, JSONL, a folder or a data set")


def open_begun(name: str, keys: Sequence[str], *, split: str, encode: Encoder) -> DocumentReader:
    """The source called ``name``, if it begins well: what is wrong is said before hours of work on others.

    Raises:
        InputError: if there is none, its first document does not do, or it has no text.
    """
    source = open_documents(name, keys, split=split, encode=encode)
    if not any(text.strip() for document in source.documents(keys) for text in document.texts):
        raise InputError(f"{name} is empty", got="no text", needed="at least one document")
    return source


def check_split(split: str, sources: Sequence[DocumentReader]) -> None:
    """Refuse a split where no source has any.

    Raises:
        InputError: naming the flag.
    """
    if split != TRAIN and not any(source.has_splits() for source in sources):
        raise InputError(f"--split {split} has no effect: nothing that is read has splits", do="leave it out")


class _WholeText(DocumentReader):
    """The one long text that a known data set is for calibration, cut into documents."""

    def __init__(self, reader: TextReader):
        self._reader = reader
        self.name = reader.name

    def files(self) -> list[Path]:
        return self._reader.files()

    def documents(self, keys: Sequence[str]) -> Iterator[Document]:
        text, _ = self._reader.text()
        blocks = (text[start : start + LONGEST] for start in range(0, len(text), LONGEST))
        return plain_documents(self._reader, blocks, keys)


def plain_documents(reader: Reader, blocks: Iterable[str], keys: Sequence[str]) -> Iterator[Document]:
    """Documents of a text that comes in blocks.

    Raises:
        InputError: if several texts of a document are asked for.
    """
    if len(keys) > 1:
        raise InputError(f"{reader.name} is plain text: it has no fields", got="keys " + ", ".join(keys), needed="one key")
    return (Document((piece,), len(piece.encode("utf-8"))) for piece in pieces(blocks))


def pieces(blocks: Iterable[str], longest: int = LONGEST) -> Iterator[str]:
    """Cut a text that comes in ``blocks`` of any size; the pieces joined are the text.

    A piece has at most ``longest`` characters, and at least half of that unless it is the last. It ends behind the last blank
    line that allows, else behind a line, a word, a character.
    """
    held = ""
    for block in blocks:
        held += block
        while len(held) > longest:
            stop = _stop(held, longest)
            yield held[:stop]
            held = held[stop:]
    if held:
        yield held


def _stop(text: str, longest: int) -> int:
    for mark in ("\n\n", "\n", " "):
        found = text.rfind(mark, longest // 2, longest)
        if found >= 0:
            return found + len(mark)
    return longest


def within_memory(name: str, parts: Iterable[str]) -> Iterator[str]:
    """The parts of a text that is to be tokenised whole, as long as there are not too many.

    Raises:
        InputError: if the text is longer than what can be.
    """
    held = 0
    for part in parts:
        held += len(part)
        if held > MOST:
            raise InputError(
                f"{name} is too long to be tokenised whole",
                got=f"more than {MOST} characters",
                needed="less",
                do="make a pair of it, of which only what is drawn is read (megatron-prune preprocess), or name a part of it",
            )
        yield part
