"""WinoGrande: calibration on train, evaluation on validation."""

from __future__ import annotations

from typing import Any

from megatron_prune.text.hub import Origin
from megatron_prune.text.questions import QuestionReader, numbered
from megatron_prune.text.reader import READERS
from megatron_prune.text.splits import TEST, TRAIN


@READERS.register("winogrande")
class WinoGrande(QuestionReader):
    """``allenai/winogrande``, xl."""

    origin = Origin(
        id="allenai/winogrande",
        config="winogrande_xl",
        splits={TRAIN: "train", TEST: "validation"},
        columns=("sentence", "option1", "option2"),
    )

    def prompt(self, row: dict[str, Any]) -> str:
        return f"Fill in the blank:\n{row['sentence']}\n{numbered((1, 2), (row['option1'], row['option2']))}Answer:"
