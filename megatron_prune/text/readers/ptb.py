"""Penn Treebank, words only: sentences joined with spaces, train for calibration and test for evaluation (GPTQ).

The data set on the hub is a script, which ``datasets`` no longer runs; the hub's own Parquet copy of it is read.
"""

from __future__ import annotations

from typing import Any

from megatron_prune.text.draw import published_starts
from megatron_prune.text.hub import Origin, texts
from megatron_prune.text.reader import READERS, TextReader


@READERS.register("ptb")
class PennTreebank(TextReader):
    """``ptb_text_only``."""

    origin = Origin(
        id="ptb-text-only/ptb_text_only",
        columns=("sentence",),
        options={"data_dir": "penn_treebank", "revision": "refs/convert/parquet"},
    )
    starts = staticmethod(published_starts)

    def text(self) -> tuple[str, dict[str, Any]]:
        rows, facts = self.origin.rows(self.split)
        return " ".join(texts(self.name, rows, "sentence")), facts
