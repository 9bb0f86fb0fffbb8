"""The vocabulary of a model: what all files of its directory say together."""

from __future__ import annotations

import functools
import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Callable, Iterable, Mapping, Sequence

import numpy

from megatron_prune.errors import CheckpointError, InputError, raise_all
from megatron_prune.vocabulary import id_fields
from megatron_prune.vocabulary.joins import Derivations
from megatron_prune.vocabulary.templates import template_texts
from megatron_prune.vocabulary.tokenizer_file import KINDS, TokenizerFile

NO_TOKEN = "row without a token"

MOST_ROWS = 1 << 24
"""Of an embedding; the largest in use has a fiftieth."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Vocabulary:
    """Tokens by id, from 0 to ``rows - 1``; rows of the embedding above the last token have none.

    Attributes:
        folder: directory of the tokenizer.
        rows: rows of the model's embedding.
        files: the tokenizer's files, the one that counts first.
    """

    folder: Path
    rows: int
    files: list[TokenizerFile]

    @property
    def main(self) -> TokenizerFile:
        """The file whose runtime is used."""
        return self.files[0]

    @functools.cached_property
    def added(self) -> dict[int, str]:
        """id → text of the tokens that are found in a text before it is split."""
        found = id_fields.added_tokens(self.folder)
        for file in self.files:
            found |= file.added
        return found

    @functools.cached_property
    def pieces(self) -> dict[int, bytes]:
        """id → text of every token (raw bytes of a byte-level one, else UTF-8 as the table spells it)."""
        return self.main.pieces | {number: text.encode("utf-8") for number, text in self.added.items()}

    @functools.cached_property
    def derivations(self) -> Derivations:
        """How tokens are put together."""
        return self.main.joins.derivations(self.rows) if self.main.joins else Derivations.none(self.rows)

    @functools.cached_property
    def pinned(self) -> dict[int, str]:
        """id → why it can never go; closed: what these tokens are put together from is among them.

        Raises:
            CheckpointError: if a file names an id above the last row.
        """
        found: dict[int, str] = {}
        for token in self.encode(template_texts(self.folder, id_fields.special_texts(self.folder))):
            found |= dict.fromkeys(token, "chat template")
        found |= id_fields.named_ids(self.folder) | dict.fromkeys(self.added, "added token")
        for file in self.files:
            found |= file.pinned
        for file in self.files:
            if (start := file.special_from(alone=not self.added)) is not None:
                found |= dict.fromkeys(range(start, self.rows), "special token")
        wrong = [f"{token} ({why})" for token, why in sorted(found.items()) if not 0 <= token < self.rows]
        raise_all(CheckpointError, f"{self.folder} names ids above the model's {self.rows - 1}", wrong, do="correct these ids")
        parts = self.derivations.closure(found) - set(found)
        return found | dict.fromkeys(parts, "part of one that stays")

    def encode(self, texts: Sequence[str]) -> list[Sequence[int]]:
        """Ids of every text, nothing put around it."""
        return self.main.encode(texts) if len(texts) else []

    def decode(self, ids: Sequence[int]) -> str:
        """The text of ids, special tokens left out."""
        return self.main.decode(ids)

    def text(self, token: int) -> str:
        """A token for a person: what it says, bytes that are no text as ``\\xNN``."""
        return self.pieces.get(token, NO_TOKEN.encode()).decode("utf-8", "backslashreplace")

    @functools.cached_property
    def digest(self) -> str:
        """sha256 of which token every id means."""
        lines = [b"%d %s" % (number, self.pieces[number].hex().encode()) for number in sorted(self.pieces)]
        return hashlib.sha256(b"\n".join(lines)).hexdigest()

    def splitter(self, kept: Mapping[int, int]) -> Callable[[int], list[int]]:
        """A function: token → the ``kept`` ones that its text falls into, where it stands alone."""
        return self.main.splitter(kept)

    def ids_of_rows(self) -> numpy.ndarray:
        """bool [rows]: where there is a token."""
        found = numpy.zeros(self.rows, dtype=bool)
        found[list(self.pieces)] = True
        return found


def holds_tokenizer(folder: Path) -> bool:
    """Whether a directory has a tokenizer that can be trimmed.

    Raises:
        CheckpointError: if it is damaged.
    """
    return any(KINDS.get(name).find(folder) for name in KINDS.names())


def open_vocabulary(folder: Path, rows: int | None = None) -> Vocabulary:
    """Read the tokenizer of a directory.

    Args:
        rows: of the model's embedding; as many as there are tokens where there is no model.

    Raises:
        CheckpointError: if a file is damaged, of an unknown kind, or says something else than another.
        InputError: if there is none, or it is not the model's.
    """
    found = [file for name in KINDS.names() if (file := KINDS.get(name).find(folder))]
    if not found:
        raise InputError(
            f"{folder} holds no tokenizer that can be trimmed",
            needed="tokenizer.json, tokenizer.model (SentencePiece), a rank file of tiktoken, or vocab.json and merges.txt",
        )
    files = sorted(found, key=lambda file: file.rank)
    added = {number for file in files for number in file.added} | set(id_fields.added_tokens(folder))
    for other in files[1:]:
        _check_agreement(files[0], other, added)
    lowest, highest = min(*files[0].pieces, *added, 0), max(*files[0].pieces, *added, -1)
    if lowest < 0 or max(highest, rows or 0) >= MOST_ROWS:
        raise CheckpointError(
            f"{folder} is no tokenizer of any model",
            got=f"a token of id {lowest if lowest < 0 else highest}" if lowest < 0 or highest >= MOST_ROWS else f"{rows} rows",
            needed=f"ids from 0 on, below {MOST_ROWS}",
        )
    if rows is not None and highest >= rows:
        raise InputError(
            f"the tokenizer in {folder} is not the model's",
            got=f"a token of id {highest}",
            needed=f"ids below {rows}, the rows of its embedding",
        )
    return Vocabulary(folder=folder, rows=rows or highest + 1, files=files)


def _check_agreement(one: TokenizerFile, other: TokenizerFile, added: Iterable[int]) -> None:
    skipped = set(added)
    differing = [
        f"id {number}: {_shown(one.pieces.get(number))} and {_shown(other.pieces.get(number))}"
        for number in sorted({*one.pieces, *other.pieces} - skipped)
        if one.pieces.get(number) != other.pieces.get(number)
    ]
    raise_all(
        CheckpointError,
        f"{one.path} and {other.path.name} are not the same tokenizer",
        differing,
        do="remove the one that is not the model's",
    )


def _shown(piece: bytes | None) -> str:
    return "nothing" if piece is None else repr(piece.decode("utf-8", "backslashreplace"))
