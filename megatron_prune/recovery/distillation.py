"""Who answers for the unpruned model: itself, running at the student's layout, or a file it once wrote."""

from __future__ import annotations

from abc import ABC, abstractmethod
from functools import partial
from typing import Callable, Iterable

import torch
from megatron.core import parallel_state
from megatron.core.pipeline_parallel import get_forward_backward_func
from torch import Tensor

from megatron_prune.recovery.loss import TeacherLogits, TeacherTopK
from megatron_prune.runtime.model import RunningModel

Batch = tuple[Tensor, Tensor, range]
"""Tokens and labels, int64 [batch, tokens], and the numbers of their samples."""
Answer = Callable[[], "TeacherLogits | TeacherTopK"]
"""What the teacher says of a micro-batch, worked out when it is asked for; only the last stage asks."""


class Teacher(ABC):
    """The unpruned model's logits for what the student is trained on."""

    @abstractmethod
    def answers(self, batches: list[Batch]) -> Iterable[Answer]:
        """One for each micro-batch of a step; every process of the model takes part."""


class RunningTeacher(Teacher):
    """A model beside the student, at the same TP × PP.

    On one stage it runs when a micro-batch's loss is due, and no more than one micro-batch's logits exist. On several stages
    it runs ahead of the student for all micro-batches of the step, whose logits the last stage keeps meanwhile.
    """

    def __init__(self, running: RunningModel):
        self._running, self.module = running, running.module
        running.module.eval().requires_grad_(False)
        running.module.compute_language_model_loss = lambda labels, logits: logits

    def answers(self, batches: list[Batch]) -> Iterable[Answer]:
        if parallel_state.get_pipeline_model_parallel_world_size() == 1:
            return [partial(self._answer, tokens) for tokens, _, _ in batches]
        with torch.no_grad():
            logits = get_forward_backward_func()(
                forward_step_func=self._step,
                data_iterator=iter(batches),
                model=self._running.module,
                num_microbatches=len(batches),
                seq_length=batches[0][0].shape[1],
                micro_batch_size=len(batches[0][0]),
                forward_only=True,
                collect_non_loss_data=True,
            )
        return [partial(TeacherLogits, logits=each) for each in logits] or [None] * len(batches)

    def _answer(self, tokens: Tensor) -> TeacherLogits:
        with torch.no_grad():
            return TeacherLogits(logits=self._forward(tokens))

    def _forward(self, tokens: Tensor) -> Tensor:
        """Logits [tokens, batch, padded vocabulary / TP], or the hidden states of a stage that is not the last."""
        tokens = tokens.to(self._running.device)
        positions = torch.arange(tokens.shape[1], device=tokens.device).expand_as(tokens)
        return self._running.module(input_ids=tokens, position_ids=positions, attention_mask=None, labels=tokens)

    def _step(self, iterator, module) -> tuple[Tensor, Callable]:
        return self._forward(next(iterator)[0]), lambda output, non_loss_data=True: output
