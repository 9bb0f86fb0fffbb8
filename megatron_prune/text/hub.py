"""The ``datasets`` library: loaded when it is needed, and its errors as ours."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from megatron_prune.errors import InputError, reason
from megatron_prune.text.splits import TEST, TRAIN


@dataclass(frozen=True, kw_only=True)
class Origin:
    """A data set with a well-known place.

    Attributes:
        id: on the Hugging Face hub.
        config: name of the configuration.
        splits: its splits for ``train`` (calibration) and ``test`` (evaluation): never the same one.
        columns: what must be in it.
        options: what else ``load_dataset`` is told.
    """

    id: str
    config: str | None = None
    splits: dict[str, str] = field(default_factory=lambda: {TRAIN: "train", TEST: "test"})
    columns: tuple[str, ...] = ("text",)
    options: dict[str, Any] = field(default_factory=dict)

    def rows(self, split: str) -> tuple[Any, dict[str, Any]]:
        """(rows of the split, facts); ``split`` is a purpose or a split's own name.

        Raises:
            InputError: if it cannot be loaded or lacks a column.
        """
        own = self.splits.get(split, split)
        rows = load(self.id, *([self.config] if self.config else []), split=own, **self.options)
        check_columns(self.id, rows, self.columns)
        return rows, {"dataset": self.id, "config": self.config, "split": own}


def library():
    """The module ``datasets``.

    Raises:
        InputError: if it is not installed.
    """
    try:
        import datasets
    except ImportError:
        raise InputError(
            "data sets are read with the library `datasets`, which is not installed", do="pip install datasets"
        ) from None
    return datasets


def load(path: str, *args: Any, **options: Any) -> Any:
    """``datasets.load_dataset``.

    Raises:
        InputError: for whatever goes wrong in it: no network, no such data set, configuration or split.
    """
    return _guarded(path, library().load_dataset, path, *args, trust_remote_code=False, **options)


def load_saved(folder: str) -> Any:
    """``datasets.load_from_disk``.

    Raises:
        InputError: if the folder is not whole.
    """
    return _guarded(folder, library().load_from_disk, folder)


def _guarded(what: str, function: Any, *args: Any, **options: Any) -> Any:
    try:
        return function(*args, **options)
    except Exception as error:  # the library raises dozens of kinds, of its own and of its dependencies
        raise InputError(
            f"`datasets` cannot load {what}",
            got=reason(error),
            needed="a data set on the Hugging Face hub or in its local cache, or a folder of data files",
            do="check the name and the network, or name local files",
        ) from None


def check_columns(what: str, rows: Any, columns: tuple[str, ...]) -> None:
    """Refuse rows that lack a column.

    Raises:
        InputError: naming the columns there are.
    """
    missing = [column for column in columns if column not in rows.column_names]
    if missing:
        raise InputError(
            f"{what} has no column {missing[0]!r}",
            got="columns " + ", ".join(rows.column_names),
            needed=", ".join(columns),
            do="name the column of the text with --data-field (preprocess: --json-keys)",
        )


def texts(what: str, rows: Any, column: str) -> list[str]:
    """A column of strings; empty ones are kept.

    Raises:
        InputError: if the column is missing or holds something else.
    """
    check_columns(what, rows, (column,))
    found = list(rows[column])
    wrong = next((text for text in found if not isinstance(text, str)), None)
    if wrong is not None or any(text is None for text in found):
        raise InputError(
            f"column {column!r} of {what} holds no text",
            got=type(wrong).__name__,
            do="name the column of the text with --data-field (preprocess: --json-keys)",
        )
    return found
