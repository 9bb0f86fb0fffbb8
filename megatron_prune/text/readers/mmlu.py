"""MMLU: calibration on auxiliary_train, evaluation on test."""

from __future__ import annotations

from typing import Any

from megatron_prune.text.hub import Origin
from megatron_prune.text.questions import QuestionReader, numbered
from megatron_prune.text.reader import READERS
from megatron_prune.text.splits import TEST, TRAIN


@READERS.register("mmlu")
class Mmlu(QuestionReader):
    """``cais/mmlu``, all subjects."""

    origin = Origin(
        id="cais/mmlu", config="all", splits={TRAIN: "auxiliary_train", TEST: "test"}, columns=("question", "choices")
    )

    def prompt(self, row: dict[str, Any]) -> str:
        return f"Question: {row['question']}\n{numbered('ABCDEFGHIJ', row['choices'])}Answer:"
