"""What a file of a tokenizer says, whatever its kind: pieces with ids, how they are joined, which can never go."""

from __future__ import annotations

import string
from abc import ABC, abstractmethod
from pathlib import Path
from typing import Any, Callable, Iterable, Mapping, Sequence

from megatron_prune.errors import CheckpointError
from megatron_prune.registry import Registry
from megatron_prune.vocabulary.joins import Joins

KINDS: Registry[type[TokenizerFile]] = Registry("kind of tokenizer file", "megatron_prune.vocabulary.kinds")

SPACE = "▁"
"""How SentencePiece writes a space."""

_PLAIN = {*string.printable[:95], SPACE}
"""Characters that a vocabulary of characters never loses: printable ASCII and the space."""


class TokenizerFile(ABC):
    """One file, or two that belong together.

    Attributes:
        path: the file.
        pieces: id → bytes of its text, which agree between kinds: raw bytes of byte-level tokens, else UTF-8 as spelled.
        added: id → text of the tokens that are found in a text before it is split.
        pinned: id → why it can never go.
        missing_bytes: bytes that no token stands for, of a vocabulary that is made of bytes.
        joins: the rules of byte-pair encoding; ``None`` for unigram.
    """

    rank: int
    """Which kind counts where a directory has several: the lowest."""

    path: Path
    pieces: dict[int, bytes]
    added: dict[int, str]
    pinned: dict[int, str]
    missing_bytes: list[int]
    joins: Joins | None

    @classmethod
    @abstractmethod
    def find(cls, folder: Path) -> TokenizerFile | None:
        """The file of this kind in a directory, read.

        Raises:
            CheckpointError: if it is damaged, or of a kind that is not known.
        """

    @abstractmethod
    def encode(self, texts: Sequence[str]) -> list[Sequence[int]]:
        """Ids of every text by the runtime that the file is made for, nothing put around it."""

    @abstractmethod
    def decode(self, ids: Sequence[int]) -> str:
        """The text of ids, special tokens left out."""

    @abstractmethod
    def splitter(self, kept: Mapping[int, int]) -> Callable[[int], list[int]]:
        """A function: id → the ``kept`` ids that its text falls into, where it stands alone."""

    def special_from(self, *, alone: bool) -> int | None:
        """The id from which on all rows are special, whatever they say; ``None`` where there is none.

        Args:
            alone: whether no other file of the directory adds tokens.
        """
        return None

    @abstractmethod
    def write(self, folder: Path, new_ids: Mapping[int, int]) -> None:
        """Write the file with the tokens of ``new_ids`` alone (old id → new id, in the old order)."""

    def join_splitter(self, kept: Mapping[int, int], spell: Callable[[int], Any]) -> Callable[[int], list[int]]:
        """:meth:`splitter` of byte-pair encoding."""
        joins = self.joins
        is_kept = lambda piece: joins.ids.get(piece) in kept

        def split(token: int) -> list[int]:
            found: list[int] = []
            for piece in joins.split(spell(token), is_kept):
                parts = [piece] if is_kept(piece) else byte_pieces(piece)
                found += [joins.ids[part] for part in parts if is_kept(part)]  # what no token says stays unsaid
            return found

        return split


def byte_pieces(text: str) -> list[str]:
    """``"é"`` → ``["<0xC3>", "<0xA9>"]``: what SentencePiece says of a character that is no piece."""
    return [f"<0x{byte:02X}>" for byte in text.encode("utf-8", "surrogatepass")]


BYTE_PIECES = [f"<0x{byte:02X}>" for byte in range(256)]


def unigram_splitter(
    scored: Sequence[tuple[str, float]], unk_id: int | None, fallback: bool, kept: Mapping[int, int]
) -> Callable[[int], list[int]]:
    """:meth:`TokenizerFile.splitter` of a unigram model whose ids are places in ``scored``."""
    from tokenizers import models

    left = sorted(number for number in kept if number < len(scored))
    model = models.Unigram([tuple(scored[number]) for number in left], None if unk_id is None else left.index(unk_id), fallback)
    return lambda token: [left[piece.id] for piece in model.tokenize(scored[token][0])]


def pinned_characters(ids: Mapping[str, int], fallback: bool) -> dict[int, str]:
    """Pieces of a vocabulary of characters that can never go.

    Args:
        ids: piece → id of the ordinary ones.
        fallback: whether bytes stand in for a character that is no piece; else all characters stay.
    """
    why = "ASCII" if fallback else "character"
    return {ids[piece]: why for piece in ids if len(piece) == 1 and (not fallback or piece in _PLAIN)}


def check_byte_pieces(path: Path, ids: Mapping[str, int]) -> dict[int, str]:
    """The 256 byte pieces, pinned.

    Raises:
        CheckpointError: if there are not 256 of them.
    """
    absent = [piece for piece in BYTE_PIECES if piece not in ids]
    if absent:
        raise CheckpointError(f"{path} falls back to bytes but lacks pieces for them", got=", ".join(absent[:5]) + " …")
    return {ids[piece]: "byte" for piece in BYTE_PIECES}


def lowest_scored(scored: Iterable[tuple[int, float]]) -> int:
    """The piece of the lowest score: that of an unknown character is set from it."""
    return min(scored, key=lambda pair: pair[1])[0]


_LONGEST, _WORK = 1024, 1 << 28
"""Symbols of a piece, and the sum of their squares over all: what taking pieces apart costs. Vocabularies in use need 2^24."""


def check_lengths(path: Path, pieces: Iterable[str | bytes]) -> None:
    """Refuse pieces that no tokenizer has learnt, and that would take hours to be taken apart.

    Raises:
        CheckpointError: naming the file.
    """
    lengths = [len(piece) for piece in pieces]
    longest, work = max(lengths, default=0), sum(length * length for length in lengths)
    if longest > _LONGEST or work > _WORK:
        got = f"a token of {longest} symbols" if longest > _LONGEST else f"{len(lengths)} tokens of up to {longest} symbols"
        raise CheckpointError(f"{path}: the tokens are too long to be taken apart", got=got, needed=f"at most {_LONGEST} each")
