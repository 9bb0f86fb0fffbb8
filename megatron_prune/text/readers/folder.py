"""A folder: of files of text and of records, or one that ``save_to_disk`` of ``datasets`` wrote."""

from __future__ import annotations

import re
from functools import cached_property
from pathlib import Path
from typing import Any, Iterator, Sequence

from megatron_prune.errors import InputError
from megatron_prune.text import hub
from megatron_prune.text.contents import Contents, contents_of, summary
from megatron_prune.text.documents import Document, DocumentReader, within_memory
from megatron_prune.text.reader import READERS, TextReader
from megatron_prune.text.readers.compressed import INNER, inner_ending
from megatron_prune.text.records import joined, row_documents
from megatron_prune.text.splits import TEST, TRAIN
from megatron_prune.text.streams import is_compressed
from megatron_prune.text.talks import find_talk

_READ = (*INNER, ".parquet", ".arrow")

_NO_RECORDS = "JSON without the field that is read"

_SPLITS = {
    **{word: TRAIN for word in ("train", "training")},
    **{word: "validation" for word in ("validation", "valid", "val", "dev")},
    **{word: TEST for word in ("test", "testing", "eval", "evaluation")},
}
_SHARD = re.compile(r"([-._]?\d+(-of-\d+)?)?(\.\w+)*")


@READERS.register("/")
class Folder(TextReader, DocumentReader):
    """All files of text, JSON, CSV, Parquet and Arrow in it, plain or compressed, at any depth, in the order of their paths,
    joined with blank lines. Where their names say splits, as in data sets of Hugging Face, those of one split.

    What ``save_to_disk`` wrote goes to ``datasets``: its split for the purpose, or its only one.
    """

    def text(self) -> tuple[str, dict[str, Any]]:
        if self._is_ours:
            texts = (("\n\n" if number else "") + file.text()[0] for number, file in enumerate(self._readers()))
            return "".join(within_memory(self.name, texts)), {"split": self._split_and_contents[0], **self.contents()}
        own, rows = self._rows()
        text, _ = joined(self.name, row_documents(self.name, rows, (self.field,), self.encode))
        return text, {"split": own, "field": self.field}

    def documents(self, keys: Sequence[str]) -> Iterator[Document]:
        if self._is_ours:
            for file in self._readers():
                yield from file.documents(keys)
        else:
            yield from row_documents(self.name, self._rows()[1], keys, self.encode)

    def size(self) -> int | None:
        sizes = [file.size() for file in self._readers()] if self._is_ours else []
        return None if None in sizes else sum(sizes) or None

    def files(self) -> list[Path]:
        return self._split_and_contents[1].read if self._is_ours else []

    def has_splits(self) -> bool:
        return not self._is_ours or self._split_and_contents[0] is not None

    def contents(self) -> dict[str, Any]:
        return self._split_and_contents[1].facts() if self._is_ours else {}

    @cached_property
    def _is_ours(self) -> bool:
        """Whether the files are read here.

        Raises:
            InputError: if none of them can be.
        """
        folder = Path(self.name)
        if (folder / "dataset_dict.json").is_file() or (folder / "state.json").is_file():
            return False
        found = self._split_and_contents[1]
        if found.read:
            return True
        if not found.passed:
            raise InputError(f"{folder} is empty", needed="files of text or data in it")
        passed = summary(self.name, found.facts())
        raise InputError(f"there is no text in {folder}", got=passed, needed="a file that is read: " + ", ".join(_READ))

    @cached_property
    def _split_and_contents(self) -> tuple[str | None, Contents]:
        """(the split, or ``None`` where names say none, what is read of the folder)."""
        found = contents_of(Path(self.name), _is_text)
        for file in [file for file in found.read if _ending(file) == ".json" and not self._holds_records(file)]:
            found.read.remove(file)
            found.pass_over(file, _NO_RECORDS)
        splits: dict[str, list[Path]] = {}
        for file in found.read:
            splits.setdefault(_split_of(file.relative_to(found.folder)) or TRAIN, []).append(file)
        if len(splits) < 2 or not any(_split_of(file.relative_to(found.folder)) == TRAIN for file in found.read):
            return None, found
        own = _choose(self.name, splits, _SPLITS.get(self.split, self.split))
        for other, files in splits.items():
            for file in files if other != own else ():
                found.read.remove(file)
                found.pass_over(file, f"of the split {other}")
        return own, found

    def _readers(self) -> Iterator[Any]:
        """Of the files that are read here."""
        for file in self.files():
            yield self._reader(file)

    def _reader(self, file: Path) -> Any:
        return READERS.get(file.suffix.lower())(str(file), encode=self.encode, field=self.field)

    def _holds_records(self, file: Path) -> bool:
        """Whether a JSON file is one of the data, or one about it: its first record has the field, or a talk."""
        first = next(self._reader(file).records((self.field,)), None)
        fields = first.value if first and isinstance(first.value, dict) else {}
        return first is None or self.field in fields or find_talk(fields, self.field) is not None

    def _rows(self) -> tuple[str, Any]:
        """(split, its rows) of what ``datasets`` finds."""
        found = hub.load_saved(self.name)
        splits = found if isinstance(found, dict) else {TRAIN: found}
        own = _choose(self.name, splits, self.split)
        return own, splits[own]


def _is_text(file: Path) -> bool:
    return _ending(file) in (INNER if is_compressed(file) else _READ)


def _ending(file: Path) -> str:
    return inner_ending(file) if is_compressed(file) else file.suffix.lower()


def _split_of(file: Path) -> str | None:
    """The split that a file's name or one of its folders says: ``data/train-00000-of-00002.parquet``, ``test/0.txt``."""
    for part in reversed(file.parts):
        word = re.match(r"[A-Za-z]+", part)
        if word and word[0].lower() in _SPLITS and _SHARD.fullmatch(part, word.end()):
            return _SPLITS[word[0].lower()]
    return None


def _choose(name: str, splits: dict[str, Any], split: str) -> str:
    """The split that serves a purpose; local data with one split only has been split by the user.

    Raises:
        InputError: naming the splits there are.
    """
    wanted = (TEST, "validation") if split == TEST else (split,)
    own = next((one for one in wanted if one in splits), next(iter(splits)) if len(splits) == 1 else None)
    if own is None:
        raise InputError(f"{name} has no split {split!r}", got="splits " + ", ".join(splits), needed=" or ".join(wanted))
    return own
