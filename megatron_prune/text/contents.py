"""What of a folder is read: every file of text below it, once, in the order of the paths; all else is passed over by name."""

from __future__ import annotations

import os
import re
import stat
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Callable, Iterable, Iterator

from megatron_prune.errors import InputError
from megatron_prune.text.streams import UNPACKED

HIDDEN, LINKED, NOT_REGULAR, EMPTY = "hidden", "links to folders: name those", "links to nothing, pipes or devices", "empty"
ABOUT, TOKENS, UNKNOWN = "about the data", "tokens: name their prefix", "no ending of text that is read"

_ABOUT = re.compile(r"(readme|licen[cs]e|copying|notice|citation|changelog)([-_. ].*)?", re.IGNORECASE)
_ABOUT_ENDINGS = ("", ".txt", ".md", ".rst", ".html")
_DESCRIPTIONS = ("dataset_info.json", "dataset_infos.json", "dataset_dict.json", "state.json")
"""Files that say what is in a data set."""

_TOKENS = (".bin", ".idx", ".safetensors")
_MADE_BY_PROGRAMS = ("__MACOSX", "__pycache__")

_SHOWN = 8
"""Names in a line of the log; the record has all."""


@dataclass(frozen=True, kw_only=True)
class Contents:
    """What is read of a folder, and what is not.

    Attributes:
        read: the files, in order.
        passed: why → the files (and folders) that are passed over.
    """

    folder: Path
    read: list[Path] = field(default_factory=list)
    passed: dict[str, list[Path]] = field(default_factory=dict)

    def pass_over(self, file: Path, why: str) -> None:
        """File it under ``why``."""
        self.passed.setdefault(why, []).append(file)

    def facts(self) -> dict[str, Any]:
        """JSON-able: ``files``, and ``passed_over`` by reason; paths from the folder on."""
        text = lambda name: name.encode("utf-8", "replace").decode("utf-8")  # the system's names are bytes, JSON's are not
        relative = lambda files: [text(file.relative_to(self.folder).as_posix()) for file in files]
        return {"files": relative(self.read), "passed_over": {why: relative(files) for why, files in self.passed.items()}}


def contents_of(folder: Path, is_text: Callable[[Path], bool]) -> Contents:
    """Look through a folder.

    Args:
        is_text: whether a file's name says that it is read.

    Raises:
        InputError: if a folder cannot be looked into.
    """
    found, seen = Contents(folder=folder), {}
    for file, why in walk(folder):
        why = why or _reason(file, is_text)
        if why is None:
            facts = file.stat()
            first = seen.setdefault((facts.st_dev, facts.st_ino), file)
            why = None if first is file else "other names of files that are read"
        if why is None:
            found.read.append(file)
        else:
            found.pass_over(file, why)
    return found


def walk(folder: Path) -> Iterator[tuple[Path, str | None]]:
    """Every file below a folder, in the order of the paths, and why it is none to read, if so.

    What is hidden is not looked into, and neither is a link to a folder: it may lead round in a circle, or anywhere.

    Raises:
        InputError: if a folder cannot be looked into.
    """
    try:
        entries = sorted(os.scandir(folder), key=lambda entry: entry.name)
    except OSError as error:
        raise InputError(f"{folder} cannot be read", got=error.strerror) from None
    for path in (folder / entry.name for entry in entries):
        facts = facts_of(path)
        if path.name.startswith(".") or path.name in _MADE_BY_PROGRAMS:
            yield path, HIDDEN
        elif facts is None or not (stat.S_ISDIR(facts.st_mode) or stat.S_ISREG(facts.st_mode)):
            yield path, NOT_REGULAR
        elif stat.S_ISREG(facts.st_mode):
            yield path, None if facts.st_size else EMPTY
        elif path.is_symlink():
            yield path, LINKED
        else:
            yield from walk(path)


def facts_of(path: Path) -> os.stat_result | None:
    """Of what a path leads to, if it leads anywhere."""
    try:
        return path.stat()
    except OSError:
        return None


def _reason(file: Path, is_text: Callable[[Path], bool]) -> str | None:
    """Why a file is passed over for its name; ``None`` if it is read."""
    ending = file.suffix.lower()
    if file.name in _DESCRIPTIONS or (_ABOUT.fullmatch(file.name) and ending in _ABOUT_ENDINGS):
        return ABOUT
    if ending in _TOKENS or (ending == ".json" and file.with_suffix(".idx").exists()):
        return TOKENS
    if not is_text(file):
        return UNKNOWN
    if ending in UNPACKED and file.with_suffix("").is_file():
        return "compressed, beside the same unpacked"
    return None


def check_read_once(flag: str, sources: Iterable[tuple[str, list[Path]]]) -> None:
    """Refuse sources that hold the same file.

    Args:
        sources: the name and the files of each.

    Raises:
        InputError: naming the file and both sources.
    """
    seen: dict[tuple[int, int], tuple[int, str]] = {}
    for number, (name, files) in enumerate(sources):
        for facts, file in ((facts_of(file), file) for file in files):
            first = seen.setdefault((facts.st_dev, facts.st_ino), (number, name)) if facts else (number, name)
            if first[0] != number:
                raise InputError(f"{flag}: {file} would be read twice", got=f"{first[1]} and {name}", do="leave one of them out")


def summary(name: str, facts: dict[str, Any]) -> str | None:
    """One line about a folder, of its ``facts``; ``None`` for what is no folder of files."""
    if "files" not in facts:
        return None
    read = f"{name}: read {_count(facts['files'])}" + (f" ({_some(facts['files'])})" if facts["files"] else "")
    passed = facts["passed_over"]
    if not passed:
        return f"{read}; passed over nothing"
    total = sum(map(len, passed.values()))
    return f"{read}; passed over {total}: " + "; ".join(f"{_some(files)} ({why})" for why, files in passed.items())


def _count(files: list[str]) -> str:
    return f"{len(files)} file{'' if len(files) == 1 else 's'}"


def _some(files: list[str]) -> str:
    more = len(files) - _SHOWN
    shown = "".join(letter if letter.isprintable() else "?" for letter in ", ".join(files[:_SHOWN]))
    return shown + (f" and {more} more" if more > 0 else "")
