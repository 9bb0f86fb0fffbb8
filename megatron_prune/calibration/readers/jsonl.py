"""JSON lines: one document a line, its text in a field; documents are joined with blank lines, then read as one text."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Iterator, Sequence

from megatron_prune.calibration.documents import Document
from megatron_prune.calibration.reader import READERS
from megatron_prune.calibration.readers.text import FileReader, opened
from megatron_prune.errors import InputError


@READERS.register(".jsonl")
@READERS.register(".json")
class JsonLines(FileReader):
    """One JSON object a line; empty lines are passed over."""

    def text(self) -> tuple[str, dict[str, Any]]:
        texts = [document.texts[0] for document in self.documents((self.field,))]
        return "\n\n".join(texts), {"split": None, "field": self.field, "documents": len(texts)}

    def documents(self, keys: Sequence[str]) -> Iterator[Document]:
        file = Path(self.name)
        with opened(file, "rb") as lines:
            for number, line in enumerate(lines, 1):
                if line.strip():
                    record = _record(file, number, line)
                    yield Document(tuple(_text(file, number, record, key) for key in keys), len(line))


def _record(file: Path, number: int, line: bytes) -> dict[str, Any]:
    """One line.

    Raises:
        InputError: naming the line.
    """
    try:
        record = json.loads(line.decode("utf-8"))
    except UnicodeDecodeError as error:
        raise InputError(f"{file}, line {number} cannot be read as text", got=str(error), needed="UTF-8") from None
    except (ValueError, RecursionError) as error:
        raise InputError(f"{file}, line {number} is not JSON", got=str(error), needed="one JSON object a line") from None
    if not isinstance(record, dict):
        raise InputError(f"{file}, line {number}", got=type(record).__name__, needed="a JSON object")
    return record


def _text(file: Path, number: int, record: dict[str, Any], key: str) -> str:
    """The text in a field.

    Raises:
        InputError: naming the line.
    """
    text = record.get(key)
    if not isinstance(text, str):
        raise InputError(
            f"{file}, line {number} has no text in field {key!r}",
            got=type(text).__name__ if key in record else "fields " + ", ".join(record),
            do="name the field of the text with --data-field (preprocess: --json-keys)",
        )
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise InputError(f"{file}, line {number} is no text", got=str(error), needed="characters, not halves of them") from None
    return text
