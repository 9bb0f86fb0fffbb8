"""Question sets as calibration text: one question with its choices is one sample, cut to the sequence length, not padded
with other questions. The right answer is not written out. Templates are those of S0, the draw is S0's too.
"""

from __future__ import annotations

import random
from abc import abstractmethod
from typing import Any

from megatron_prune.errors import InputError
from megatron_prune.text.draw import pad
from megatron_prune.text.hub import Origin
from megatron_prune.text.reader import Drawn, TextReader


class QuestionReader(TextReader):
    """A question set; for evaluation its questions are joined with blank lines.

    Attributes:
        origin: where it is; its calibration split is one that benchmarks do not measure on.
    """

    origin: Origin

    @abstractmethod
    def prompt(self, row: dict[str, Any]) -> str:
        """One question as text, ending where the answer would begin."""

    def text(self) -> tuple[str, dict[str, Any]]:
        rows, facts = self.origin.rows(self.split)
        return "\n\n".join(self._prompt(row) for row in rows), facts

    def draw(self, *, seq_length: int, count: int, seed: int) -> Drawn:
        rows, facts = self.origin.rows(self.split)
        if len(rows) < count:
            raise InputError(
                f"{self.name} ({facts['split']}) holds fewer questions than asked for",
                got=len(rows),
                needed=count,
                do="lower --nsamples",
            )
        chosen = random.Random(seed).sample(range(len(rows)), count)
        tokens, lengths = pad([self.encode(self._prompt(rows[number])) for number in chosen], seq_length)
        return Drawn(tokens=tokens, lengths=lengths, facts=facts)

    def _prompt(self, row: dict[str, Any]) -> str:
        try:
            return self.prompt(row)
        except (KeyError, TypeError, IndexError, ValueError) as error:
            raise InputError(f"a row of {self.name} is not as expected", got=f"{type(error).__name__}: {error}") from None


def numbered(labels: Any, choices: Any) -> str:
    """One line per choice: ``label. choice``.

    Raises:
        ValueError: if there are fewer labels than choices.
    """
    if len(labels) < len(choices):
        raise ValueError(f"{len(choices)} choices, {len(labels)} labels")
    return "".join(f"{label}. {choice}\n" for label, choice in zip(labels, choices))
