"""How often a corpus uses every token: a file that can be kept, added to others, and weighted."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Annotated, Any, Sequence

import numpy
import torch
from pydantic import Field
from safetensors.numpy import save

from megatron_prune.errors import InputError
from megatron_prune.files.documents import STRICT, parse_json
from megatron_prune.files.tensor_file import open_tensors

_FORMAT = "megatron-prune token counts"
Amount = Annotated[int, Field(ge=0)]


@dataclass(frozen=True, kw_only=True)
class Corpus:
    """What was counted.

    Attributes:
        name: of the corpus, without folders.
        documents, tokens, size: how many; bytes of the source.
        weight: its share of all corpora's counts, up to a common factor; ``None`` where occurrences simply add up.
        contents: of a folder, which files were read and which were not.
    """

    __pydantic_config__ = STRICT

    name: str
    documents: Amount
    tokens: Amount
    size: Amount
    weight: Annotated[float, Field(gt=0)] | None = None
    contents: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True, eq=False)
class Counts:
    """Attributes:
    digest: of the vocabulary (``Vocabulary.digest``).
    corpora: what was counted.
    tables: int64 [rows] for each corpus, occurrences by id.
    """

    digest: str
    corpora: list[Corpus]
    tables: list[numpy.ndarray]

    def total(self) -> numpy.ndarray:
        """float64 [rows]: occurrences over all corpora. Weighted ones are scaled to their shares of what was counted.

        Raises:
            InputError: if only some have weights, or a weighted one has no tokens.
        """
        rows = max(len(table) for table in self.tables)
        tables = [numpy.pad(table, (0, rows - len(table))).astype(numpy.float64) for table in self.tables]
        weights = [corpus.weight for corpus in self.corpora]
        if all(weight is None for weight in weights):
            return sum(tables)
        if any(weight is None for weight in weights):
            bare = self.corpora[weights.index(None)].name
            raise InputError(
                "weights of corpora", got=f"{bare} without one beside weighted ones", needed="weights for all or none"
            )
        empty = [corpus.name for corpus, table in zip(self.corpora, tables) if not table.any()]
        if empty:
            raise InputError("a corpus without tokens has a weight", got=", ".join(empty), do="leave it out")
        counted, whole = sum(table.sum() for table in tables), sum(weights)
        return sum(table * (weight / whole * counted / table.sum()) for table, weight in zip(tables, weights))

    def weighted(self, weight: float) -> Counts:
        """The same with all corpora as one, of this weight."""
        names = " + ".join(corpus.name for corpus in self.corpora)
        sums = {key: sum(getattr(corpus, key) for corpus in self.corpora) for key in ("documents", "tokens", "size")}
        table = numpy.rint(self.total()).astype(numpy.int64)
        return Counts(digest=self.digest, corpora=[Corpus(name=names, weight=weight, **sums)], tables=[table])

    def dumps(self) -> bytes:
        """The file: safetensors, one table for each corpus."""
        head = {"format": _FORMAT, "digest": self.digest, "corpora": json.dumps([asdict(corpus) for corpus in self.corpora])}
        return save({f"counts.{number}": table for number, table in enumerate(self.tables)}, head)

    def dump_text(self) -> bytes:
        """S4's file: a line for every id, ``id count``, the most frequent first, equals by id."""
        total = numpy.rint(self.total()).astype(numpy.int64)
        order = numpy.argsort(-total, kind="stable")
        return "".join(f"{number} {total[number]}\n" for number in order.tolist()).encode()


def is_counts(path: Path) -> bool:
    """Whether a file holds token counts."""
    try:
        load_counts(path)
    except InputError:
        return False
    return True


def load_counts(path: Path) -> Counts:
    """Read what :meth:`Counts.dumps` gave.

    Raises:
        InputError: if it is no such file, or damaged.
    """
    again = "make them with megatron-prune vocab count"
    with open_tensors(path, error=InputError, do=again) as file:
        if file.metadata.get("format") != _FORMAT:
            raise InputError(f"{path} holds no token counts", got="another kind of file", do=again)
        said = file.metadata.get("corpora", "")
        corpora = parse_json(said, list[Corpus], f"{path}: corpora", error=InputError, do=again)
        if not corpora or "digest" not in file.metadata:
            raise InputError(f"{path} holds no token counts", got="no corpora" if not corpora else "no digest", do=again)
        tables = [file.read(f"counts.{number}", torch.int64, (None,), least=0).numpy() for number in range(len(corpora))]
        return Counts(digest=file.metadata["digest"], corpora=corpora, tables=tables)


def merged(parts: Sequence[Counts]) -> Counts:
    """All corpora of several files.

    Raises:
        InputError: if they are of different vocabularies.
    """
    for part in parts[1:]:
        if part.digest != parts[0].digest:
            names = [part.corpora[0].name, parts[0].corpora[0].name]
            raise InputError("token counts of different tokenizers", got=" and ".join(names), do="count with one tokenizer")
    corpora = [corpus for part in parts for corpus in part.corpora]
    return replace(parts[0], corpora=corpora, tables=[table for part in parts for table in part.tables])
