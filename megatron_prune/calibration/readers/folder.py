"""A folder: of text and JSONL files, or whatever ``datasets`` loads from it."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Iterator, Sequence

from megatron_prune.calibration import hub
from megatron_prune.calibration.documents import Document, DocumentReader, row_documents
from megatron_prune.calibration.reader import READERS, TEST, TRAIN, TextReader
from megatron_prune.errors import InputError

_OURS = (".txt", ".jsonl", ".txt.gz", ".jsonl.gz")


@READERS.register("/")
class Folder(TextReader, DocumentReader):
    """All ``.txt`` and ``.jsonl`` files in it, plain or ``.gz``, at any depth, in the order of their paths, joined with blank
    lines.

    A folder without such files goes to ``datasets`` (Parquet, CSV, Arrow, ``save_to_disk``): its split for the purpose, or
    its only one.
    """

    def text(self) -> tuple[str, dict[str, Any]]:
        folder, files = Path(self.name), self._files()
        if files:
            texts = [file.text()[0] for file in files]
            return "\n\n".join(texts), {"split": None, "files": [Path(f.name).relative_to(folder).as_posix() for f in files]}
        own, rows = self._rows()
        return "\n\n".join(hub.texts(self.name, rows, self.field)), {"split": own, "field": self.field}

    def documents(self, keys: Sequence[str]) -> Iterator[Document]:
        files = self._files()
        for file in files:
            yield from file.documents(keys)
        if not files:
            yield from row_documents(self.name, self._rows()[1], keys)

    def size(self) -> int | None:
        sizes = [file.size() for file in self._files()]
        return None if None in sizes else sum(sizes) or None

    def _files(self) -> list[Any]:
        """Readers of the files that are read here."""
        found = sorted(file for file in Path(self.name).rglob("*") if file.name.endswith(_OURS) and file.is_file())
        return [READERS.get(file.suffix)(str(file), encode=self.encode, field=self.field) for file in found]

    def _rows(self) -> tuple[str, Any]:
        """(split, its rows) of what ``datasets`` finds."""
        splits = self._load(Path(self.name))
        own = _choose(self.name, splits, self.split)
        return own, splits[own]

    def _load(self, folder: Path) -> dict[str, Any]:
        """Split → rows."""
        if not any(folder.iterdir()):
            raise InputError(f"{folder} is empty", needed="text or data files in it")
        saved = (folder / "dataset_dict.json").is_file() or (folder / "state.json").is_file()
        found = hub.load_saved(str(folder)) if saved else hub.load(str(folder))
        return found if isinstance(found, dict) else {TRAIN: found}


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
