"""WikiText-2 (raw). Calibration: train texts joined with spaces (S0, GPTQ); evaluation: test texts, blank ones too, joined
with blank lines (SparseGPT, Wanda)."""

from __future__ import annotations

from typing import Any

from megatron_prune.text.draw import published_starts
from megatron_prune.text.hub import Origin, texts
from megatron_prune.text.reader import READERS, TextReader
from megatron_prune.text.splits import TEST


@READERS.register("wikitext2")
class WikiText2(TextReader):
    """``wikitext-2-raw-v1``."""

    origin = Origin(id="Salesforce/wikitext", config="wikitext-2-raw-v1")
    starts = staticmethod(published_starts)

    def text(self) -> tuple[str, dict[str, Any]]:
        rows, facts = self.origin.rows(self.split)
        return ("\n\n" if self.split == TEST else " ").join(texts(self.name, rows, "text")), facts
