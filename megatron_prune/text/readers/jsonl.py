"""JSON lines, and JSON: one document a record; documents are joined with blank lines, then read as one text."""

from __future__ import annotations

import codecs
import json
import re
from pathlib import Path
from typing import Any, Iterator, Sequence

from megatron_prune.errors import InputError
from megatron_prune.text.reader import READERS
from megatron_prune.text.records import Record, RecordReader, json_error
from megatron_prune.text.streams import opened

LONGEST_RECORD = 1 << 27
"""Bytes that a record may have: what is read before it is known where one ends."""


@READERS.register(".jsonl")
@READERS.register(".ndjson")
class JsonLines(RecordReader):
    """One JSON object a line; empty lines are passed over."""

    unit = "line"

    def records(self, columns: Sequence[str]) -> Iterator[Record]:
        with opened(Path(self.name)) as stream:
            number = 0
            while line := stream.readline(LONGEST_RECORD + 1):
                number += 1
                if line.strip():
                    where = self.where(number)
                    check_length(where, len(line))
                    yield Record(where, _object(where, line), len(line))


def _object(where: str, line: bytes) -> Any:
    """The value of one line.

    Raises:
        InputError: naming the line.
    """
    try:
        return json.loads(line.decode("utf-8").removeprefix("\ufeff"))
    except UnicodeDecodeError as error:
        raise InputError(f"{where} cannot be read as text", got=str(error), needed="UTF-8") from None
    except (ValueError, RecursionError) as error:
        raise json_error(where, error, "one JSON object a line") from None


@READERS.register(".json")
class Json(RecordReader):
    """An array of objects, one object, or objects one after the other: lines, or over several lines each."""

    unit = "line"

    def records(self, columns: Sequence[str]) -> Iterator[Record]:
        with opened(Path(self.name)) as stream:
            values = _Values(self, stream)
            if values.take(r"\[") is None:
                while not values.at_end():
                    yield values.next()
                return
            if values.take(r"\]") is None:
                yield values.next()
                while values.take(","):
                    yield values.next()
                if values.take(r"\]") is None:
                    raise values.error("it does not go on with , or ]")
            if not values.at_end():
                raise values.error("something follows the array")


class _Values:
    """JSON values one after the other, taken from a stream that may be larger than memory."""

    _BLOCK = 1 << 18

    def __init__(self, reader: Json, stream: Any):
        self._reader, self._stream, self._decode = reader, stream, codecs.getincrementaldecoder("utf-8")().decode
        self._held, self._place, self._line, self._ended = "", 0, 1, False

    def take(self, mark: str) -> str | None:
        """The mark that comes next, taken; ``None`` if another does."""
        found = None if self.at_end() else re.compile(mark).match(self._held, self._place)
        if found is None:
            return None
        self._place = found.end()
        return found[0]

    def at_end(self) -> bool:
        """Whether nothing but space is left."""
        while True:
            space = _SPACE.match(self._held, self._place).end()
            self._line += self._held.count("\n", self._place, space)
            self._place = space
            if space < len(self._held):
                return False
            if not self._more():
                return True

    def next(self) -> Record:
        """The record that comes next.

        Raises:
            InputError: if it is not JSON, naming the line that it begins at.
        """
        if self.at_end():
            raise self.error("it ends too early")
        while True:
            try:
                value, stop = _DECODER.raw_decode(self._held, self._place)
            except (ValueError, RecursionError) as error:
                if not _may_be_cut(error, len(self._held)) or not self._more():
                    raise self.error(error) from None
                continue
            where, taken = self._where(), self._held[self._place : stop]
            self._line += taken.count("\n")
            self._place = stop
            return Record(where, value, len(taken))

    def error(self, error: Exception | str) -> InputError:
        """What is wrong here."""
        return json_error(self._where(), error, "an array of objects, or objects")

    def _where(self) -> str:
        return self._reader.where(self._line)

    def _more(self) -> bool:
        """Read on, twice as much as is held; whether there was more."""
        if self._ended:
            return False
        rest = self._held[self._place :]
        check_length(self._where(), len(rest))
        block = self._stream.read(max(self._BLOCK, len(rest)))
        try:
            self._held, self._place, self._ended = rest + self._decode(block, not block), 0, not block
        except UnicodeDecodeError as error:
            raise InputError(f"{self._reader.name} cannot be read as text", got=str(error), needed="UTF-8") from None
        return not self._ended


_DECODER = json.JSONDecoder()
_SPACE = re.compile(r"[ \t\r\n\ufeff]*")


def _may_be_cut(error: Exception, held: int) -> bool:
    """Whether an error may be for want of what was not read yet."""
    if not isinstance(error, json.JSONDecodeError):
        return False
    return error.msg.startswith("Unterminated string") or error.pos >= held - 12


def check_length(where: str, length: int) -> None:
    """Refuse a record without an end.

    Raises:
        InputError: naming it.
    """
    if length > LONGEST_RECORD:
        raise InputError(f"{where} has no end", got=f"more than {LONGEST_RECORD >> 20} MiB", needed="records that are shorter")
