"""CSV and TSV files: a line that names the columns, then one document a row; joined and read as JSON lines are."""

from __future__ import annotations

import csv
import io
from pathlib import Path
from typing import Iterator, Sequence

from megatron_prune.errors import InputError
from megatron_prune.text.reader import READERS
from megatron_prune.text.readers.jsonl import LONGEST_RECORD
from megatron_prune.text.records import Record, RecordReader
from megatron_prune.text.streams import opened

csv.field_size_limit(LONGEST_RECORD)


@READERS.register(".csv")
class Csv(RecordReader):
    """Columns with commas between them; a field in double quotes may go over several lines."""

    unit = "line"
    delimiter = ","

    def records(self, columns: Sequence[str]) -> Iterator[Record]:
        with opened(Path(self.name)) as stream, io.TextIOWrapper(stream, encoding="utf-8", newline="") as text:
            rows = csv.DictReader(text, delimiter=self.delimiter, strict=True)
            try:
                for row in rows:
                    if None in row or None in row.values():
                        raise csv.Error("more or fewer fields than the first line names")
                    yield Record(self.where(rows.line_num), row, sum(map(len, row.values())))
            except csv.Error as error:
                raise InputError(f"{self.where(rows.reader.line_num)} is no row of a table", got=str(error)) from None


@READERS.register(".tsv")
class Tsv(Csv):
    """Columns with tabs between them."""

    delimiter = "\t"
