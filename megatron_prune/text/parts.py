"""Texts → a Megatron ``.bin``/``.idx`` pair, by several processes, in parts that an interrupted run keeps.

A part is two files: ``.bin``, its tokens as they will be in the pair, and ``.npy``, int32, the length of every document; it is
there as soon as the second is. Which process writes it, and when, changes nothing about it.
"""

from __future__ import annotations

import contextlib
import io
import os
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Callable, Iterable, Iterator, Mapping, Sequence, TypeVar

import numpy
import xxhash

from megatron_prune.errors import InputError
from megatron_prune.files import staging
from megatron_prune.text.talks import Span
from megatron_prune.text.workers import in_processes

_BATCH = 1 << 20
"""Characters that are tokenised together."""

T = TypeVar("T")


@dataclass(frozen=True, kw_only=True)
class Coding:
    """How a text becomes tokens.

    Attributes:
        tokenizer: of Hugging Face.
        special_tokens: whether it puts its own special tokens around a text.
        eod: token that ends every document, if one does.
        dtype: numpy's name of a token's type in the file.
        answers: whether a mask goes with the tokens: 1 for those that the assistant says in a talk.
    """

    tokenizer: Any
    special_tokens: bool
    eod: int | None
    dtype: str
    answers: bool = False


@dataclass(frozen=True, kw_only=True)
class Part:
    """Consecutive documents.

    Attributes:
        prefix: of its files.
        texts: one for each document.
        answers: for each text, which characters the assistant says; ``None`` where it is no talk.
        size: bytes of the source that they take up.
    """

    prefix: str
    texts: list[str]
    answers: list[list[Span] | None]
    size: int

    @property
    def is_written(self) -> bool:
        return os.path.exists(f"{self.prefix}.npy")


def write_parts(parts: Iterable[Part], coding: Coding, *, workers: int, progress: Callable[[int], None]) -> list[str]:
    """Write those that are not there; few more than there are workers are in memory at a time.

    Args:
        progress: called with the size of each part when it is there.

    Returns:
        Their prefixes, in order.

    Raises:
        PruneError: if a worker was ended from outside.
        OSError: if a part cannot be written.
    """
    prefixes: list[str] = []

    def unwritten() -> Iterator[Part]:
        for part in parts:
            prefixes.append(part.prefix)
            if part.is_written:
                progress(part.size)
            else:
                yield part

    for size in in_processes(unwritten(), _write_part, workers=workers, begin=_begin_worker, given=(coding,)):
        progress(size)
    return prefixes


_coding: Coding
"""What a worker is given once: a tokenizer takes longer to load than a part to write."""


def _begin_worker(coding: Coding) -> None:
    global _coding
    _coding = coding


def _write_part(part: Part) -> int:
    return write_part(part, _coding)


def write_part(part: Part, coding: Coding) -> int:
    """Tokenise the texts of a part and write it; its ``size``."""
    lengths = []
    with contextlib.ExitStack() as stack:
        files = {name: stack.enter_context(open(f"{part.prefix}.{name}", "wb")) for name in _streams(coding)}
        for tokens, mask in _tokenised(part, coding):
            files["bin"].write(numpy.array(tokens, dtype=coding.dtype).tobytes())
            if coding.answers:
                files["mask"].write(mask.tobytes())
            lengths.append(len(tokens))
    for name in files:
        staging.sync(Path(f"{part.prefix}.{name}"))
    held = io.BytesIO()
    numpy.save(held, numpy.array(lengths, dtype=numpy.int32))
    staging.write_bytes(Path(f"{part.prefix}.npy"), held.getvalue())
    return part.size


def _streams(coding: Coding) -> tuple[str, ...]:
    return ("bin", "mask") if coding.answers else ("bin",)


def _tokenised(part: Part, coding: Coding) -> Iterator[tuple[list[int], numpy.ndarray | None]]:
    """The tokens of every text that has any; with a mask uint8 [tokens] if there is to be one."""
    for batch in grouped(list(zip(part.texts, part.answers)), lambda item: len(item[0]), _BATCH):
        found = coding.tokenizer(
            [text for text, _ in batch],
            add_special_tokens=coding.special_tokens,
            return_attention_mask=False,
            return_offsets_mapping=coding.answers,
            verbose=False,
        )
        for number, (tokens, (_, answers)) in enumerate(zip(found["input_ids"], batch)):
            if tokens:
                ended = coding.eod is None or (answers is not None and tokens[-1] == coding.eod)
                mask = answer_mask(found["offset_mapping"][number], answers, ended) if coding.answers else None
                yield (tokens if ended else [*tokens, coding.eod]), mask


def answer_mask(offsets: Sequence[tuple[int, int]], answers: Sequence[Span], ended: bool) -> numpy.ndarray:
    """uint8 [tokens]: 1 for tokens that begin within an answer.

    Args:
        offsets: characters that each token stands for. Of a token that is nothing but space some tokenizers say where it ends.
        ended: whether nothing follows; else a 0 for the token that does.
    """
    starts, ends = numpy.array(offsets, dtype=numpy.int64).reshape(-1, 2).T
    mask = numpy.zeros(len(starts) + (not ended), dtype=numpy.uint8)
    for start, end in answers:
        within = numpy.where(ends > starts, (starts >= start) & (starts < end), (ends > start) & (ends <= end))
        mask[: len(starts)] |= within.astype(numpy.uint8)
    return mask


def text_digest(texts: Iterable[str], answers: Iterable[list[Span] | None] = ()) -> str:
    """Which texts these are, where each ends, and what of them are answers."""
    found = xxhash.xxh3_128()
    for text in texts:
        data = text.encode("utf-8")
        found.update(b"%d:" % len(data))
        found.update(data)
    spans = list(answers)
    if any(each is not None for each in spans):
        found.update(repr(spans).encode())
    return found.hexdigest()


def grouped(items: Iterable[T], size: Callable[[T], int], enough: int) -> Iterator[list[T]]:
    """Consecutive items, as many together as have ``enough`` size."""
    group, held = [], 0
    for item in items:
        group.append(item)
        held += size(item)
        if held >= enough:
            yield group
            group, held = [], 0
    if group:
        yield group


def join_parts(parts: Iterable[str], prefix: str, dtype: str, stream: str = "bin") -> tuple[int, int]:
    """One pair out of the parts with these prefixes, in this order; how many documents and tokens it holds.

    Args:
        stream: ending of the files whose values it holds, of ``dtype``: ``bin`` (tokens) or ``mask``.

    Raises:
        OSError: if it cannot be written.
    """
    from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder

    builder = IndexedDatasetBuilder(f"{prefix}.bin", dtype=getattr(numpy, dtype))
    for part in parts:
        with open(f"{part}.{stream}", "rb") as values:
            shutil.copyfileobj(values, builder.data_file)
        builder.sequence_lengths.extend(numpy.load(f"{part}.npy").tolist())
    documents = len(builder.sequence_lengths)
    builder.document_indices.extend(range(1, documents + 1))
    builder.finalize(f"{prefix}.idx")
    return documents, sum(builder.sequence_lengths)


_ENDINGS = ("json", "bin", "idx")
"""Files of a pair, in the order in which they are put in place: there is no pair before its index is there."""


def check_prefix(prefix: Path) -> None:
    """Refuse what is no start of names, such as ``.`` or ``/``.

    Raises:
        InputError: saying so.
    """
    if prefix.name in ("", ".."):
        raise InputError("--save", got=prefix, needed="what the names of the files begin with, such as data/train")


def pair_files(prefix: Path) -> dict[str, Path]:
    """Ending → file of a pair and of the record beside it."""
    return {ending: prefix.with_name(f"{prefix.name}.{ending}") for ending in _ENDINGS}


def place_pairs(work: Path, pairs: Mapping[Path, Path]) -> None:
    """Put finished pairs in place, all together; old indices go first, so that no index ever belongs to other tokens.

    A run that is stopped in between has the next one, and whoever opens a pair, complete it.

    Args:
        work: of :func:`staging.work`.
        pairs: prefix of the files' places → prefix of the files in ``work``. Without a record an old one goes.
    """
    moves: list[tuple[Path, Path | None]] = [(pair_files(prefix)["idx"], None) for prefix in pairs]
    for prefix, made in pairs.items():
        for ending, file in pair_files(made).items():
            moves.append((pair_files(prefix)[ending], file if file.exists() else None))
    staging.place_from_work(work, moves)
