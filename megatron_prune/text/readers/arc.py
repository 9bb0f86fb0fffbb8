"""ARC, easy and challenge: calibration on train, evaluation on test."""

from __future__ import annotations

from typing import Any

from megatron_prune.text.hub import Origin
from megatron_prune.text.questions import QuestionReader, numbered
from megatron_prune.text.reader import READERS


@READERS.register("arc_easy")
class ArcEasy(QuestionReader):
    """``allenai/ai2_arc``, easy."""

    origin = Origin(id="allenai/ai2_arc", config="ARC-Easy", columns=("question", "choices"))

    def prompt(self, row: dict[str, Any]) -> str:
        return f"Question: {row['question']}\n{numbered(row['choices']['label'], row['choices']['text'])}Answer:"


@READERS.register("arc_challenge")
class ArcChallenge(ArcEasy):
    """``allenai/ai2_arc``, challenge."""

    origin = Origin(id="allenai/ai2_arc", config="ARC-Challenge", columns=("question", "choices"))
