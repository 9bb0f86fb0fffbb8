"""Records (of JSON lines, JSON, tables) → documents: a text in a field, or a talk."""

from __future__ import annotations

import json
from abc import abstractmethod
from dataclasses import dataclass
from typing import Any, Iterator, Sequence

from megatron_prune.calibration import talks
from megatron_prune.calibration.documents import Document, FileReader, within_memory
from megatron_prune.errors import InputError


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
        counted = 0

        def parts() -> Iterator[str]:
            nonlocal counted
            for document in self.documents((self.field,)):
                if counted and not document.is_talk:  # talks say themselves where they begin
                    yield "\n\n"
                yield document.texts[0]
                counted += 1

        return "".join(within_memory(self.name, parts())), {"split": None, "field": self.field, "documents": counted}

    def documents(self, keys: Sequence[str]) -> Iterator[Document]:
        for record in self.records((*keys, *talks.FIELDS, *talks.BESIDE)):
            said = [self._said(record, key) for key in keys]
            yield Document(tuple(text for text, _ in said), record.size, tuple(answers for _, answers in said))

    def _said(self, record: Record, key: str) -> tuple[str, list[talks.Span] | None]:
        """The text in a field, without a byte-order mark; of a talk, which characters are answers.

        Raises:
            InputError: naming the record.
        """
        where, fields = record.where, record.value
        if not isinstance(fields, dict):
            raise InputError(where, got=type(fields).__name__, needed="a JSON object")
        talk, answers = talks.find_talk(fields, key), None
        if talk is not None:
            messages, tools = talks.read_talk(talk, fields, where)
            text, answers = self.encode.render(messages, tools, where)
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


def json_error(where: str, error: Exception | str, needed: str) -> InputError:
    """What is said of a record that is not JSON."""
    if isinstance(error, json.JSONDecodeError):
        got = f"{error.msg} at character {error.pos}"
    elif isinstance(error, RecursionError):
        got = "values in values, too deep"
    else:
        got = error if isinstance(error, str) else "a number of thousands of digits"
    return InputError(f"{where} is not JSON", got=got, needed=needed)
