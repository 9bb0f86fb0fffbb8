"""What gradients are of: a functional of a model's forward pass over one sample."""

from __future__ import annotations

from abc import ABC, abstractmethod

from torch import Tensor

from megatron_prune.registry import Registry
from megatron_prune.runtime.model import RunningModel

OBJECTIVES: Registry[type[Objective]] = Registry("objective", "megatron_prune.importance.objectives")


class Objective(ABC):
    """A functional that is a sum over pipeline stages. One is made, on every rank, for the passes over all samples.

    Args:
        model: what runs; forward hooks that are set on its modules are taken off in :meth:`close`.
    """

    def __init__(self, model: RunningModel):
        self.model = model

    @abstractmethod
    def part(self, tokens: Tensor, length: int, output: Tensor) -> Tensor | None:
        """This stage's part of a sample's functional, right after the stage ran it forward.

        Args:
            tokens: int64 [1, tokens], padded.
            length: of the sample; what comes after it counts nothing.
            output: what the stage gives: logits [1, tokens, padded vocabulary / TP] of the last, else the stream.

        Returns:
            A float32 scalar that leads back to the weights, the same on all tensor-parallel ranks; ``None``: no part.
        """

    def terms(self, length: int) -> int:
        """Of how many terms a sample's functional is the mean."""
        return 1

    def close(self) -> None:
        """Take off what was set on the model."""
