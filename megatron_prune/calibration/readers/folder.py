"""A folder: of text and JSONL files, or whatever ``datasets`` loads from it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from megatron_prune.calibration import hub
from megatron_prune.calibration.reader import READERS, TEST, TRAIN, TextReader
from megatron_prune.errors import InputError

_OURS = (".txt", ".jsonl")


@READERS.register("/")
class Folder(TextReader):
    """All ``.txt`` and ``.jsonl`` files in it, at any depth, in the order of their paths, joined with blank lines.

    A folder without such files goes to ``datasets`` (Parquet, CSV, Arrow, ``save_to_disk``): its split for the purpose, or
    its only one.
    """

    def text(self) -> tuple[str, dict[str, Any]]:
        folder = Path(self.name)
        files = sorted(file for file in folder.rglob("*") if file.suffix in _OURS and file.is_file())
        if files:
            return self._joined(folder, files)
        splits = self._load(folder)
        own = _choose(self.name, splits, self.split)
        return "\n\n".join(hub.texts(self.name, splits[own], self.field)), {"split": own, "field": self.field}

    def _joined(self, folder: Path, files: list[Path]) -> tuple[str, dict[str, Any]]:
        texts = [READERS.get(file.suffix)(str(file), encode=self.encode, field=self.field).text()[0] for file in files]
        return "\n\n".join(texts), {"split": None, "files": [file.relative_to(folder).as_posix() for file in files]}

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
