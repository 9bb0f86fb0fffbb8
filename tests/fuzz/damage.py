"""What can happen to files, and values that nobody would write into them or on a command line."""

from __future__ import annotations

import json
import os
import random
import shutil
from pathlib import Path
from typing import Any

NESTED: Any = []
for _ in range(300):
    NESTED = [NESTED]

VALUES: list[Any] = [None, True, False, "", "x", "\x1b[31mred", "../x", -1, 0, 1, 7, 1.5, 1e308, float("nan"), float("inf")]
VALUES += [10**20, -(10**20), [], {}, [[]], {"a": 1}, "y" * 5000, NESTED, [1, 2, 3], "10", 2**31, 2**63]

FLAGS = [
    "",
    " ",
    "x",
    "-1",
    "0",
    "1",
    "2",
    "3",
    "7",
    "1.5",
    "nan",
    "inf",
    "-inf",
    "1e308",
    "1e-308",
    "99999999999999999999",
    "0x10",
]
FLAGS += [
    "/dev/null",
    ".",
    "/",
    "..",
    "\x1b[31m",
    "ü",
    "a,b",
    "1,2",
    "1,1",
    "-1,0",
    "self",
    "self:0",
    "self:nan",
    "90%",
    "5GB",
    "1M",
    "٣",
]


def damage(path: Path, draw: random.Random) -> str:
    """Damage one file of a material; what was done, for people."""
    files = [path] if path.is_file() else sorted(file for file in path.rglob("*") if file.is_file())
    files = files or sorted(path.parent.glob(f"{path.name}.*"))
    file = draw.choice(files)
    changes = [_flip, _flip, _cut, _grow, _empty, _junk, _directory, _pipe, _gone]
    if file.suffix in (".json", ".jsonl", "") and _json(file) is not None:
        changes += [_field] * 12
    if file.suffix == ".safetensors" or file.name == "counts":
        changes += [_header] * 6
    return f"{file.name}: {draw.choice(changes)(file, draw)}"


def _flip(file: Path, draw: random.Random) -> str:
    data = bytearray(file.read_bytes())
    if not data:
        return "nothing to flip"
    place = draw.randrange(len(data)) if draw.random() < 0.5 else draw.randrange(min(len(data), 512))
    data[place] ^= 1 << draw.randrange(8)
    file.write_bytes(data)
    return f"a bit of byte {place} flipped"


def _cut(file: Path, draw: random.Random) -> str:
    size = draw.randrange(file.stat().st_size + 1)
    os.truncate(file, size)
    return f"cut to {size} bytes"


def _grow(file: Path, draw: random.Random) -> str:
    with open(file, "ab") as target:
        target.write(b"\0" * draw.choice([1, 8, 4096]))
    return "zeros appended"


def _empty(file: Path, draw: random.Random) -> str:
    file.write_bytes(b"")
    return "emptied"


def _junk(file: Path, draw: random.Random) -> str:
    file.write_bytes(
        draw.choice([b"junk", b"\xff\xfe", b"[" * 200_000, b"{" * 100, b"\0" * 64, b"null", b"3", b'"x"', b"[]", b"{}"])
    )
    return "replaced by junk"


def _directory(file: Path, draw: random.Random) -> str:
    file.unlink()
    file.mkdir()
    return "a directory instead"


def _pipe(file: Path, draw: random.Random) -> str:
    file.unlink()
    os.mkfifo(file)
    return "a pipe instead"


def _gone(file: Path, draw: random.Random) -> str:
    file.unlink()
    return "removed"


def _json(file: Path) -> Any:
    try:
        return json.loads(file.read_bytes())
    except (ValueError, RecursionError):
        return None


def _field(file: Path, draw: random.Random) -> str:
    data, said = changed(json.loads(file.read_bytes()), draw)
    file.write_text(json.dumps(data))
    return said


def _header(file: Path, draw: random.Random) -> str:
    data = file.read_bytes()
    size = int.from_bytes(data[:8], "little")
    header, said = changed(json.loads(data[8 : 8 + size]), draw)
    text = json.dumps(header).encode()
    file.write_bytes(len(text).to_bytes(8, "little") + text + data[8 + size :])
    return f"header: {said}"


def changed(data: Any, draw: random.Random) -> tuple[Any, str]:
    """A JSON document with one place changed, removed, or added to."""
    places = list(_places(data, ()))
    if not places:
        return draw.choice(VALUES), "replaced"
    *way, key = draw.choice(places)
    holder = data
    for step in way:
        holder = holder[step]
    where = ".".join(map(str, (*way, key)))
    kind = draw.random()
    if kind < 0.15 and isinstance(holder, dict):
        del holder[key]
        return data, f"{where} removed"
    if kind < 0.25 and isinstance(holder, dict):
        holder[draw.choice(["new", "", "format", "0"])] = draw.choice(VALUES)
        return data, f"something new beside {where}"
    value = draw.choice(VALUES)
    holder[key] = value
    return data, f"{where} = {str(value)[:40]!r}"


def _places(data: Any, way: tuple, depth: int = 0):
    items = data.items() if isinstance(data, dict) else enumerate(data[:8]) if isinstance(data, list) else ()
    for key, value in items:
        yield (*way, key)
        if depth < 6:
            yield from _places(value, (*way, key), depth + 1)


def remove(folder: Path) -> None:
    """A case's files."""
    shutil.rmtree(folder, ignore_errors=True)
