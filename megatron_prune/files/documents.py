"""Documents from outside: read within limits, parsed, checked against a description, or refused with a message.

This is the one place that turns what a damaged file can do to a reader (not a regular file, not UTF-8, not JSON, nested
without end, a field missing, unknown or of a wrong type, NaN) into an error that names file, field, got and needed.
"""

from __future__ import annotations

import functools
import json
import os
import re
import reprlib
import stat
from collections import Counter
from pathlib import Path
from typing import Any, BinaryIO, TypeVar

from megatron_prune.errors import CheckpointError, InputError, plain

T = TypeVar("T")

LIMIT = 1 << 30
"""Bytes that a document may have; the longest in use, tokenizers, have a tenth."""

STRICT = {"extra": "forbid", "allow_inf_nan": False}
"""``__pydantic_config__`` of dataclasses that are read from files: no unknown field, no number that is none."""


def open_regular(path: Path, *, error: type[InputError] = CheckpointError, do: str | None = None) -> BinaryIO:
    """Open a file to read; a pipe or a device is refused rather than waited for.

    Raises:
        InputError (of the kind ``error``): if it is missing, may not be read, or is no regular file.
    """
    try:
        number = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
    except FileNotFoundError:
        raise error(f"{path} is missing", do=do) from None
    except (OSError, ValueError) as found:  # ValueError: a NUL in the name
        raise error(f"{path} cannot be read", got=getattr(found, "strerror", None) or str(found), do=do) from None
    if not stat.S_ISREG(os.fstat(number).st_mode):
        os.close(number)
        raise error(f"{path}", got="a directory" if path.is_dir() else "a pipe or a device", needed="a regular file", do=do)
    return os.fdopen(number, "rb")


def read_bytes(path: Path, *, limit: int = LIMIT, error: type[InputError] = CheckpointError, do: str | None = None) -> bytes:
    """All bytes of a regular file of at most ``limit`` bytes."""
    with open_regular(path, error=error, do=do) as file:
        size = os.fstat(file.fileno()).st_size
        if size > limit:
            raise error(f"{path}", got=f"{size} bytes", needed=f"at most {limit}")
        try:
            return file.read(limit)
        except OSError as found:
            raise error(f"{path} cannot be read", got=found.strerror) from None


def read_text(path: Path, *, limit: int = LIMIT, error: type[InputError] = CheckpointError) -> str:
    """The UTF-8 text of a regular file."""
    try:
        return read_bytes(path, limit=limit, error=error).decode("utf-8")
    except UnicodeDecodeError as found:
        raise error(f"{path} is not UTF-8 text", got=f"byte {found.object[found.start]:#04x} at {found.start}") from None


def read_json(
    path: Path,
    kind: type[T] = dict[str, Any],
    *,
    error: type[InputError] = CheckpointError,
    do: str | None = None,
    once: bool = False,
) -> T:
    """A JSON file as a value of ``kind``: see :func:`parse_json`."""
    return parse_json(read_bytes(path, error=error, do=do), kind, path, error=error, do=do, once=once)


def parse_json(
    text: str | bytes,
    kind: type[T],
    where: object,
    *,
    error: type[InputError] = CheckpointError,
    do: str | None = None,
    once: bool = False,
) -> T:
    """JSON as a value of ``kind``, a type annotation whose every part is checked; nothing is converted.

    Args:
        kind: such as ``dict[str, Any]``, ``list[int]``, or a dataclass (with ``__pydantic_config__ = STRICT``), which is built.
        where: the file, for messages.
        error: what is raised.
        do: what the user can do about a damaged file.
        once: a field that stands twice is refused; else the last one counts, as everywhere.

    Raises:
        InputError (of the kind ``error``): naming the field, what was got and what was needed.
    """
    from pydantic import ValidationError

    try:
        found = _reader(kind).validate_json(text, strict=True)
    except ValidationError as found:
        problem, *others = found.errors(include_url=False)
    except InputError as found:  # a dataclass's own check
        raise (error if type(found) is InputError else type(found))(f"{where}: {found}") from None
    except RecursionError:
        raise error(f"{where} is nested too deeply", do=do) from None
    else:
        if once and (twice := _twice(text)):
            raise error(f"{where}", got=f"the field {twice} twice", needed="every field once", do=do)
        return found
    if problem["type"] == "json_invalid":
        raise error(f"{where} is not JSON", got=problem["msg"], do=do) from None
    place = lambda of: ".".join(_key(part) for part in of["loc"] if not _KIND.fullmatch(str(part)))
    field = place(problem)
    others = [other for other in others if place(other) != field]  # not what else the same value was tried as
    more = f"; {len(others)} more field{'s' if len(others) > 1 else ''} not as needed" if others else ""
    got = None if problem["type"] == "missing" else shorten(problem["input"])
    needed = _NEEDED.get(problem["type"], problem["msg"].removeprefix("Input should be "))
    raise error(f"{where}" + (f": {field}" if field else ""), got=got, needed=needed + more, do=do) from None


def _twice(text: str | bytes) -> str | None:
    """A field of valid JSON that stands twice in one object, for a message."""
    found: list[str] = []

    def looked_at(pairs: list[tuple[str, Any]]) -> None:
        found.extend(name for name, count in Counter(name for name, _ in pairs).items() if count > 1)

    json.loads(text, object_pairs_hook=looked_at, parse_int=str)  # no limit on digits
    return shorten(found[0], 40) if found else None


_NEEDED = {
    "missing": "a value: the field is missing",
    "unexpected_keyword_argument": "no field of that name",
    "extra_forbidden": "no field of that name",
}
"""Where pydantic's words would not be understood without Python."""


def parse_versioned(
    text: str | bytes,
    kind: type[T],
    where: object,
    *,
    format: str,
    version: int,
    error: type[InputError] = CheckpointError,
    do: str | None = None,
) -> T:
    """A document of this project as a value of ``kind``: a JSON object that says its ``format`` and ``version`` beside.

    A version only adds fields that may be missing: earlier ones are read too.

    Raises:
        InputError (of the kind ``error``): also if it is of another format or of a later version.
    """
    held = parse_json(text, dict[str, Any], where, error=error, do=do, once=True)
    if held.pop("format", None) != format:
        raise error(f"{where} is something else", needed=f'"format": "{format}"', do=do)
    found = held.pop("version", None)
    if type(found) is not int or not 1 <= found <= version:
        needed = f"version {version}" if version == 1 else f"version 1 to {version}"
        later = type(found) is int and found > version
        raise error(f"{where}", got=f"version {shorten(found)}", needed=needed, do="update megatron-prune" if later else do)
    return parse_json(json.dumps(held), kind, where, error=error, do=do)


def shorten(value: object, limit: int = 80) -> str:
    """``repr`` of a value from outside, for a message: on one line, without control characters, not longer than ``limit``."""
    try:
        text = _BRIEF.repr(value)  # bounded also where parts are shared again and again
    except Exception:  # such as an integer of thousands of digits
        text = f"a {type(value).__name__}"
    return plain(text.replace("\n", "?"), limit)


_KIND = re.compile(r"int|constrained-int|(list|dict|literal|tuple|function-\w+|constrained-\w+)\[.*\]", re.DOTALL)
"""Which of several kinds a value was tried as: no part of its place."""


def _key(part: int | str) -> str:
    return str(part) if isinstance(part, int) or part.isidentifier() else shorten(part, 40)


_BRIEF = reprlib.Repr()
_BRIEF.maxlevel, _BRIEF.maxstring, _BRIEF.maxother, _BRIEF.maxlong = 3, 120, 120, 120


@functools.cache
def _reader(kind: Any) -> Any:
    from pydantic import TypeAdapter

    return TypeAdapter(kind)
