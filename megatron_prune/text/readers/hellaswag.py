"""HellaSwag: calibration on train, evaluation on validation."""

from __future__ import annotations

from typing import Any

from megatron_prune.text.hub import Origin
from megatron_prune.text.questions import QuestionReader, numbered
from megatron_prune.text.reader import READERS
from megatron_prune.text.splits import TEST, TRAIN


@READERS.register("hellaswag")
class HellaSwag(QuestionReader):
    """``Rowan/hellaswag``."""

    origin = Origin(
        id="Rowan/hellaswag", splits={TRAIN: "train", TEST: "validation"}, columns=("activity_label", "ctx", "endings")
    )

    def prompt(self, row: dict[str, Any]) -> str:
        choices = numbered(range(1, len(row["endings"]) + 1), row["endings"])
        return f"Activity: {row['activity_label']}\nContext: {row['ctx']}\nWhat happens next?\n{choices}Answer:"
