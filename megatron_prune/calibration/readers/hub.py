"""Any data set on the Hugging Face hub: ``owner/name``, or ``owner/name/configuration``."""

from __future__ import annotations

from typing import Any

from megatron_prune.calibration import hub
from megatron_prune.calibration.reader import READERS, TEST, TextReader
from megatron_prune.errors import InputError


@READERS.register("owner/name")
class HubDataset(TextReader):
    """Its rows joined with blank lines. Evaluation takes ``test``, else ``validation``, and never ``train``."""

    @property
    def label(self) -> str:
        return self.name

    def text(self) -> tuple[str, dict[str, Any]]:
        parts = self.name.split("/")
        place = ["/".join(parts[:2]), *parts[2:]]
        own, rows = self._rows(place)
        facts = {"dataset": place[0], "config": place[1] if parts[2:] else None, "split": own, "field": self.field}
        return "\n\n".join(hub.texts(self.name, rows, self.field)), facts

    def _rows(self, place: list[str]) -> tuple[str, Any]:
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
