"""Parquet and Arrow files: one document a row, read a few rows at a time; joined and read as JSON lines are."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import Any, Iterator, Sequence

from megatron_prune.errors import InputError, reason
from megatron_prune.files.documents import open_regular, shorten
from megatron_prune.text import talks
from megatron_prune.text.reader import READERS
from megatron_prune.text.records import Record, RecordReader

_ROWS = 256
"""Rows that are read together."""


class _Table(RecordReader):
    """A file of columns; those that are asked for are read, and no others.

    Attributes:
        kind: what its format is called.
    """

    unit, kind = "row", ""

    def records(self, columns: Sequence[str]) -> Iterator[Record]:
        number = 0
        with open_regular(Path(self.name), error=InputError) as file, self._guarded():
            for batch in self._batches(file, columns):
                each = max(1, batch.nbytes // max(1, batch.num_rows))
                for number, row in enumerate(batch.to_pylist(), number + 1):
                    yield Record(self.where(number), row, each)

    def _batches(self, file: Any, columns: Sequence[str]) -> Iterator[Any]:
        """Rows, a few at a time."""
        raise NotImplementedError

    def _chosen(self, schema: Any, wanted: Sequence[str]) -> list[str]:
        """The columns of a schema that are read.

        Raises:
            InputError: naming the columns there are, if one that holds texts is missing or holds something else.
        """
        keys = [name for name in wanted if name not in (*talks.FIELDS, *talks.BESIDE)]
        for key in keys:
            if key not in schema.names and not any(name in schema.names for name in talks.FIELDS):
                raise self._unlike(f"{self.name} has no column {key!r}", schema)
            if key in schema.names and not _may_hold_text(schema.field(key).type):
                raise self._unlike(f"column {key!r} of {self.name} holds no text", schema)
        return [name for name in schema.names if name in wanted]

    def _unlike(self, what: str, schema: Any) -> InputError:
        columns = ", ".join(f"{shorten(field.name)[1:-1]} ({shorten(str(field.type))[1:-1]})" for field in schema)
        do = "name the column of the text with --data-field (preprocess: --json-keys)"
        return InputError(what, got=f"columns {columns}", needed="a column of text, or of messages", do=do)

    @contextlib.contextmanager
    def _guarded(self) -> Iterator[None]:
        import pyarrow

        try:
            yield
        except (pyarrow.ArrowException, OSError, ValueError, OverflowError) as error:
            raise InputError(f"{self.name} cannot be read", got=reason(error), needed=f"a whole {self.kind} file") from None


def _may_hold_text(kind: Any) -> bool:
    """Whether it is a type of texts, perhaps in a dictionary, or of lists, which may be talks."""
    from pyarrow import types

    kind = kind.value_type if types.is_dictionary(kind) else kind
    tests = (types.is_string, types.is_large_string, types.is_string_view, types.is_list, types.is_large_list)
    return any(test(kind) for test in tests)


@READERS.register(".parquet")
class Parquet(_Table):
    """A Parquet file, such as a shard of a data set."""

    kind = "Parquet"

    def _batches(self, file: Any, columns: Sequence[str]) -> Iterator[Any]:
        from pyarrow import parquet

        table = parquet.ParquetFile(file, buffer_size=1 << 20)
        return table.iter_batches(batch_size=_ROWS, columns=self._chosen(table.schema_arrow, columns), use_threads=False)


@READERS.register(".arrow")
class Arrow(_Table):
    """An Arrow file, in either of its two layouts."""

    kind = "Arrow"

    def _batches(self, file: Any, columns: Sequence[str]) -> Iterator[Any]:
        from pyarrow import ipc

        if file.read(6) == b"ARROW1":
            table = ipc.open_file(file)
            batches = (table.get_batch(number) for number in range(table.num_record_batches))
        else:
            file.seek(0)
            table = ipc.open_stream(file)
            batches = iter(table)
        chosen = self._chosen(table.schema, columns)
        for batch in batches:
            batch = batch.select(chosen)
            batch.validate(full=True)  # the file's offsets are used as they stand: a wrong one would end the process
            yield from (batch.slice(start, _ROWS) for start in range(0, batch.num_rows, _ROWS))
