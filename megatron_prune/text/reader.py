"""What a source of samples is, and which one a name means.

A reader is one file in ``readers/``. It is filed under the word a user writes (``wikitext2``), under the ending of the files
it reads (``.jsonl``), under ``/`` (a folder) or under ``owner/name`` (a data set on the Hugging Face hub).
"""

from __future__ import annotations

import difflib
import os
import re
from abc import ABC, abstractmethod
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from megatron_prune.errors import InputError
from megatron_prune.registry import Registry
from megatron_prune.text.contents import facts_of, walk
from megatron_prune.text.draw import check_enough, random_starts, whole_windows, windows_at
from megatron_prune.text.encoder import Encoder
from megatron_prune.text.splits import TRAIN

READERS: Registry[type[Reader]] = Registry("source of text", "megatron_prune.text.readers")

_PAIR = (".bin", ".idx")

_HUB_ID = re.compile(r"[\w-][\w.-]*/[\w.-]+(/[\w.-]+)?")


@dataclass(frozen=True, kw_only=True, eq=False)
class Drawn:
    """Samples of one source.

    Attributes:
        tokens: int64 [samples, seq_length], right-padded with 0.
        lengths: int64 [samples].
        facts: JSON-able, what was read: at least ``split`` (``None`` where the source has no splits).
    """

    tokens: torch.Tensor
    lengths: torch.Tensor
    facts: dict[str, Any] = field(default_factory=dict)


def led(drawn: Drawn, token: int | None) -> Drawn:
    """Samples that begin with ``token`` (``None``: as they do), which stands in place of a token that is never predicted."""
    if token is None:
        return drawn
    tokens = drawn.tokens.clone()
    tokens[:, 0] = token
    return replace(drawn, tokens=tokens, facts={**drawn.facts, "leading": token})


class Reader(ABC):
    """One source.

    Args:
        name: as the user wrote it.
        encode: the tokenizer.
        field: name of the text in records.
        split: ``train`` (calibration), ``test`` (evaluation), or a split of the data set by its own name.

    Attributes:
        needs_tokenizer: whether text is read at all.
    """

    needs_tokenizer: bool = True

    def __init__(self, name: str, *, encode: Encoder, field: str = "text", split: str = TRAIN):
        self.name, self.encode, self.field, self.split = name, encode, field, split

    @property
    def label(self) -> str:
        """What a provenance calls it: no folders of this machine."""
        return Path(self.name).name

    def files(self) -> list[Path]:
        """The files here that are read."""
        return []

    @abstractmethod
    def draw(self, *, seq_length: int, count: int, seed: int) -> Drawn:
        """``count`` samples for calibration: the same for the same arguments, on every rank.

        Raises:
            InputError: if the source cannot be read or holds less than that.
        """

    @abstractmethod
    def windows(self, *, seq_length: int, count: int) -> Drawn:
        """The first ``count`` windows (or as many as there are) for evaluation.

        Raises:
            InputError: if the source cannot be read or holds less than one window.
        """


class TextReader(Reader):
    """A source that is one long text: it is tokenised whole, and windows are cut from the tokens."""

    starts = staticmethod(random_starts)
    """(available tokens, seq_length, count, seed) → int64 [count]."""

    @abstractmethod
    def text(self) -> tuple[str, dict[str, Any]]:
        """The whole text, and facts about it."""

    def _tokens(self) -> tuple[torch.Tensor, dict[str, Any]]:
        text, facts = self.text()
        if not text.strip():
            raise InputError(f"{self.name} is empty", got="no text", needed="text to draw samples from")
        return self.encode(text), facts

    def draw(self, *, seq_length: int, count: int, seed: int) -> Drawn:
        tokens, facts = self._tokens()
        check_enough(self.name, len(tokens), seq_length=seq_length, count=count)
        starts = self.starts(len(tokens), seq_length=seq_length, count=count, seed=seed)
        return full(windows_at(tokens, starts, seq_length), facts)

    def windows(self, *, seq_length: int, count: int) -> Drawn:
        tokens, facts = self._tokens()
        whole = whole_windows(self.name, len(tokens), seq_length=seq_length, count=count)
        return full(tokens[: whole * seq_length].view(whole, seq_length), facts)


def full(tokens: torch.Tensor, facts: dict[str, Any]) -> Drawn:
    """Samples that are as long as they are wide."""
    return Drawn(tokens=tokens, lengths=torch.full((len(tokens),), tokens.shape[1], dtype=torch.int64), facts=facts)


def reader_kind(name: str) -> str:
    """What ``name`` is filed under in :data:`READERS`.

    A known word comes first (write ``./c4`` for a file called c4), then what lies on disk, then a hub id.

    Raises:
        InputError: if it is none of them, naming words that are near.
    """
    if not name:
        raise InputError("a source without a name", got="an empty text", needed="a file, a folder or a data set")
    known, path = READERS.names(), Path(name)
    suffix = path.suffix.lower()
    if name in known and _is_word(name):
        return name
    if os.path.isdir(name):
        return "/"
    if os.path.isfile(name):
        return suffix if suffix in known else ".txt"
    if os.path.exists(name):
        raise InputError(f"{name} is a pipe or a device", needed="a regular file or a folder")
    if suffix not in known and any(os.path.isfile(f"{name}{ending}") for ending in _PAIR):
        return ".bin"
    if suffix in known or name.startswith((".", "/", "~")) or ("/" in name and os.path.isdir(path.parent)):
        raise InputError(f"there is no file or folder {name}", do="check --data")
    if _HUB_ID.fullmatch(name):
        return "owner/name"
    words = [word for word in known if _is_word(word)]
    near = difflib.get_close_matches(name, words, n=1)
    raise InputError(
        f"unknown data {name!r}" + (f"; did you mean {near[0]!r}?" if near else ""),
        got="neither a file or folder here nor a known name",
        needed="a text, JSON lines or Parquet file, a folder, the prefix of a Megatron .bin/.idx pair, owner/name of a data set on "
        "the Hugging Face hub, or one of " + ", ".join(words),
    )


def _is_word(key: str) -> bool:
    return "/" not in key and not key.startswith(".")


def stamps(name: str) -> list[tuple[str, int, int]]:
    """(file, bytes, time of the last change) of the files here that ``name`` stands for; none for what comes from a hub."""
    path = Path(name)
    beside = {path, *(Path(f"{path.with_suffix('') if path.suffix in _PAIR else path}{suffix}") for suffix in _PAIR)}
    files = [file for file, _ in walk(path)] if os.path.isdir(path) else sorted(file for file in beside if os.path.isfile(file))
    return [(str(file), facts.st_size, facts.st_mtime_ns) for file in files if (facts := facts_of(file))]


def open_reader(name: str, *, encode: Encoder, field: str, split: str) -> Reader:
    """The reader for ``name``; nothing is read yet.

    Raises:
        InputError: if there is none, or what it would read is not there.
    """
    return READERS.get(reader_kind(name))(name, encode=encode, field=field, split=split)
