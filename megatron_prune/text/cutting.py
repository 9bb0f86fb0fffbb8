"""A stream of documents → parts that processes tokenise: what is left out is counted, never lost in silence."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Iterable, Iterator, Sequence

from megatron_prune.errors import InputError
from megatron_prune.text.documents import Document, DocumentReader
from megatron_prune.text.parts import Coding, Part, grouped, text_digest


def part_size(total: int | None) -> int:
    """Bytes of text in a part: many parts for any number of workers, not too many files, and the same if a line is mended."""
    return 1 << 22 if total is None else 1 << min(max((total >> 9).bit_length(), 20), 24)


def checked(sources: Sequence[DocumentReader], keys: Sequence[str], coding: Coding) -> Iterator[Document]:
    """The documents of all sources.

    Raises:
        InputError: if talks are needed and there is other text, or special tokens are asked for and there are talks.
    """
    for source in sources:
        for document in source.documents(keys):
            talks = [document.of(column)[1] is not None for column in range(len(keys))]
            if coding.answers and not all(talks):
                raise InputError(
                    f"{source.name} holds text that is no talk",
                    needed="records with messages of roles and contents, of which --answers-only marks the assistant's",
                    do="make a pair of it without --answers-only",
                )
            if coding.special_tokens and any(talks):
                raise InputError(
                    f"{source.name} holds talks: their template says which special tokens they have",
                    do="leave out --tokenizer-hf-include-special-tokens",
                )
            yield document


def cut(documents: Iterable[Document], size: int, work: Path, left_out: Sequence[Counter], *, answers: bool) -> Iterator[Part]:
    """A part of the texts of every key, then the next of each.

    Args:
        size: bytes of the source in a part.
        left_out: for every key, to count documents in that are left out, by the reason.
        answers: whether talks without an answer are left out.
    """
    for number, group in enumerate(grouped(documents, lambda document: document.size, size)):
        for column, counter in enumerate(left_out):
            kept = []
            for text, spans in (document.of(column) for document in group):
                why = "without text" if not text.strip() else "without an answer" if answers and not spans else None
                if why is None:
                    kept.append((text, spans))
                else:
                    counter[why] += 1
            texts, spans = [text for text, _ in kept], [each for _, each in kept]
            taken = sum(document.size for document in group) if column == 0 else 0
            prefix = str(work / f"part-{column}-{number:08}-{text_digest(texts, spans)}")
            yield Part(prefix=prefix, texts=texts, answers=spans, size=taken)
