"""JSON lines: one document a line, its text in a field; documents are joined with blank lines, then read as one text."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from megatron_prune.calibration.reader import READERS, TextReader
from megatron_prune.calibration.readers.text import read_text
from megatron_prune.errors import InputError


@READERS.register(".jsonl")
@READERS.register(".json")
class JsonLines(TextReader):
    """One JSON object a line; empty lines are passed over."""

    def text(self) -> tuple[str, dict[str, Any]]:
        file = Path(self.name)
        lines = read_text(file).split("\n")
        documents = [_document(file, number, line, self.field) for number, line in enumerate(lines, 1) if line.strip()]
        return "\n\n".join(documents), {"split": None, "field": self.field, "documents": len(documents)}


def _document(file: Path, number: int, line: str, field: str) -> str:
    """The text of one line.

    Raises:
        InputError: naming the line.
    """
    try:
        record = json.loads(line)
    except ValueError as error:
        raise InputError(f"{file}, line {number} is not JSON", got=str(error), needed="one JSON object a line") from None
    if not isinstance(record, dict):
        raise InputError(f"{file}, line {number}", got=type(record).__name__, needed="a JSON object")
    if not isinstance(record.get(field), str):
        raise InputError(
            f"{file}, line {number} has no text in field {field!r}",
            got="fields " + ", ".join(record) if field not in record else type(record[field]).__name__,
            do="name the field of the text with --data-field",
        )
    try:
        record[field].encode("utf-8")
    except UnicodeEncodeError as error:
        raise InputError(f"{file}, line {number} is no text", got=str(error), needed="characters, not halves of them") from None
    return record[field]
