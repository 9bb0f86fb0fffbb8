"""Files of text as streams: unpacked as their names say, without a byte-order mark; what is no UTF-8 text is refused by name."""

from __future__ import annotations

import bz2
import codecs
import contextlib
import gzip
import io
import lzma
import zlib
from pathlib import Path
from typing import IO, Any, Iterator

from megatron_prune.errors import InputError
from megatron_prune.files.documents import open_regular

_BUFFER = 1 << 20
"""Bytes that are unpacked together: what a file unpacks to may be of any size."""

_OTHER_MARKS = {
    codecs.BOM_UTF32_LE: "UTF-32",
    codecs.BOM_UTF32_BE: "UTF-32",
    codecs.BOM_UTF16_LE: "UTF-16",
    codecs.BOM_UTF16_BE: "UTF-16",
}
"""Byte-order marks of what is not read; the long ones first, for one begins as the other does."""


def _unpacked_zstd(raw: IO[bytes]) -> Any:
    import pyarrow

    return pyarrow.CompressedInputStream(raw, "zstd")


UNPACKED = {
    ".gz": lambda raw: gzip.GzipFile(fileobj=raw),
    ".bz2": bz2.BZ2File,
    ".xz": lzma.LZMAFile,
    ".zst": _unpacked_zstd,
}
"""Ending → what unpacks a stream."""


def is_compressed(file: str | Path) -> bool:
    """Whether a file's name says so."""
    return Path(file).suffix.lower() in UNPACKED


@contextlib.contextmanager
def opened(file: Path) -> Iterator[io.BufferedReader]:
    """The bytes of a text, unpacked, from behind its byte-order mark on.

    Raises:
        InputError: if, while it is open, it turns out that it cannot be read, is damaged or cut short, or is not UTF-8.
    """
    try:
        with contextlib.ExitStack() as stack:
            raw = stack.enter_context(open_regular(file, error=InputError))
            if is_compressed(file):
                unpacked = stack.enter_context(UNPACKED[file.suffix.lower()](raw))
                raw = stack.enter_context(io.BufferedReader(unpacked, _BUFFER))
            _skip_mark(file, raw)
            yield raw
    except (OSError, EOFError, zlib.error, lzma.LZMAError, ValueError) as error:
        raise InputError(
            f"{file} cannot be read as text",
            got=str(error),
            needed=f"a whole {file.suffix} file of UTF-8 text" if is_compressed(file) else "a UTF-8 text file",
        ) from None


def _skip_mark(file: Path, stream: io.BufferedReader) -> None:
    start = stream.peek(4)[:4]
    for mark, encoding in _OTHER_MARKS.items():
        if start.startswith(mark):
            raise InputError(
                f"{file} cannot be read as text",
                got=encoding,
                needed="UTF-8",
                do=f"convert it: iconv -f {encoding} -t UTF-8",
            )
    if start.startswith(codecs.BOM_UTF8):
        stream.read(len(codecs.BOM_UTF8))


def text_blocks(file: Path, size: int) -> Iterator[str]:
    """The text of a file in blocks of at most ``size`` characters, line ends as Python reads them.

    Raises:
        InputError: as :func:`opened`; also on a NUL, which no text has.
    """
    read = 0
    with opened(file) as stream, io.TextIOWrapper(stream, encoding="utf-8") as text:
        while block := text.read(size):
            if "\0" in block:
                raise InputError(
                    f"{file} cannot be read as text",
                    got=f"a NUL byte after {read + block.index(chr(0))} characters: a binary file, or UTF-16",
                    needed="a UTF-8 text file",
                )
            read += len(block)
            yield block
