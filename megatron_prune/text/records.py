"""Records (of JSON lines, JSON, tables) → documents: a text in a field, or a talk."""

from __future__ import annotations

import json
from abc import abstractmethod
from dataclasses import dataclass, replace
from typing import Any, Iterable, Iterator, Sequence

from megatron_prune.errors import InputError
from megatron_prune.text import hub, talks
from megatron_prune.text.documents import Document, FileReader, within_memory
from megatron_prune.text.encoder import Encoder

_ROWS = 1000
"""Rows of a data set that are read together."""


@dataclass(frozen=True, slots=True)
class Record:
    """One record.

    Attributes:
        where: file and line or row, for messages.
        value: what stands there: a mapping, if it is good.
        size: bytes of the source that it takes up.
    """

    where: str
    value: Any
    size: int


class RecordReader(FileReader):
    """A file of records.

    Attributes:
        unit: what their numbers count: ``line``, ``row``.
    """

    unit: str

    @abstractmethod
    def records(self, columns: Sequence[str]) -> Iterator[Record]:
        """Every record, in order.

        Args:
            columns: the fields that are wanted; more may come.

        Raises:
            InputError: if the file cannot be read; where that shows.
        """

    def where(self, number: int) -> str:
        """What messages call a place."""
        return f"{self.name}, {self.unit} {number}"

    def text(self) -> tuple[str, dict[str, Any]]:
        text, count = joined(self.name, self.documents((self.field,)))
        return text, {"split": None, "field": self.field, "documents": count}

    def documents(self, keys: Sequence[str]) -> Iterator[Document]:
        for record in self.records((*keys, *talks.FIELDS, *talks.BESIDE)):
            yield document_of(record, keys, self.encode)


def row_documents(name: str, rows: Any, keys: Sequence[str], encode: Encoder) -> Iterator[Document]:
    """A document a row of a table of ``datasets``.

    Raises:
        InputError: if a column is missing or holds neither texts nor talks.
    """
    if not any(column in talks.FIELDS for column in rows.column_names):
        hub.check_columns(name, rows, tuple(keys))
    wanted = (*keys, *talks.FIELDS, *talks.BESIDE)
    table = rows.select_columns([column for column in rows.column_names if column in wanted])
    for start in range(0, len(table), _ROWS):
        columns = table[start : start + _ROWS]
        for number, values in enumerate(zip(*columns.values()), start + 1):
            document = document_of(Record(f"{name}, row {number}", dict(zip(columns, values)), 0), keys, encode)
            yield replace(document, size=sum(map(len, document.texts)))


def document_of(record: Record, keys: Sequence[str], encode: Encoder) -> Document:
    """The texts of a record.

    Raises:
        InputError: naming the record, if a field holds neither a text nor a talk.
    """
    said = [_said(record, key, encode) for key in keys]
    return Document(tuple(text for text, _ in said), record.size, tuple(answers for _, answers in said))


def _said(record: Record, key: str, encode: Encoder) -> tuple[str, list[talks.Span] | None]:
    """The text in a field, without a byte-order mark; of a talk, which characters are answers."""
    where, fields = record.where, record.value
    if not isinstance(fields, dict):
        raise InputError(where, got=type(fields).__name__, needed="a JSON object")
    talk, answers = talks.find_talk(fields, key), None
    if talk is not None:
        messages, tools = talks.read_talk(talk, fields, where)
        text, answers = encode.render(messages, tools, where)
    else:
        text = fields.get(key)
    if not isinstance(text, str):
        raise InputError(
            f"{where} has no text in field {key!r}",
            got=type(text).__name__ if key in fields else "fields " + ", ".join(map(str, fields)),
            do="name the field of the text with --data-field (preprocess: --json-keys)",
        )
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise InputError(f"{where} is no text", got=error.reason, needed="characters, not halves of them") from None
    return (text, answers) if answers is not None else (text.removeprefix("\ufeff"), None)


def joined(name: str, documents: Iterable[Document]) -> tuple[str, int]:
    """One text of all documents, blank lines between them (talks say themselves where they begin), and their number.

    Raises:
        InputError: if it is longer than what is tokenised whole.
    """
    counted = 0

    def parts() -> Iterator[str]:
        nonlocal counted
        for document in documents:
            if counted and not document.is_talk:
                yield "\n\n"
            yield document.texts[0]
            counted += 1

    return "".join(within_memory(name, parts())), counted


def json_error(where: str, error: Exception | str, needed: str) -> InputError:
    """What is said of a record that is not JSON."""
    if isinstance(error, json.JSONDecodeError):
        got = f"{error.msg} at character {error.pos}"
    elif isinstance(error, RecursionError):
        got = "values in values, too deep"
    else:
        got = error if isinstance(error, str) else "a number of thousands of digits"
    return InputError(f"{where} is not JSON", got=got, needed=needed)
