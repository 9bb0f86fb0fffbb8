"""Any data set on the Hugging Face hub: ``owner/name``, or ``owner/name/configuration``."""

from __future__ import annotations

from typing import Any, Iterator, Sequence

from megatron_prune.errors import InputError
from megatron_prune.text import hub
from megatron_prune.text.documents import Document, DocumentReader
from megatron_prune.text.reader import READERS, TextReader
from megatron_prune.text.records import joined, row_documents
from megatron_prune.text.splits import TEST


@READERS.register("owner/name")
class HubDataset(TextReader, DocumentReader):
    """Its rows joined with blank lines. Evaluation takes ``test``, else ``validation``, and never ``train``."""

    @property
    def label(self) -> str:
        return self.name

    def text(self) -> tuple[str, dict[str, Any]]:
        own, rows = self._rows()
        place = self._place()
        facts = {"dataset": place[0], "config": place[1] if place[1:] else None, "split": own, "field": self.field}
        return joined(self.name, row_documents(self.name, rows, (self.field,), self.encode))[0], facts

    def documents(self, keys: Sequence[str]) -> Iterator[Document]:
        return row_documents(self.name, self._rows()[1], keys, self.encode)

    def _place(self) -> list[str]:
        """``owner/name``, and the configuration if one is named."""
        parts = self.name.split("/")
        return ["/".join(parts[:2]), *parts[2:]]

    def _rows(self) -> tuple[str, Any]:
        place = self._place()
        if self.split != TEST:
            return self.split, hub.load(*place, split=self.split)
        splits = hub.load(*place)
        for own in (TEST, "validation"):
            if own in splits:
                return own, splits[own]
        raise InputError(
            f"{self.name} has nothing to evaluate on",
            got="splits " + ", ".join(splits),
            needed="test or validation",
            do="save a part of it that is not calibrated on as a file, and name that",
        )
