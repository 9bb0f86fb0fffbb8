"""Every sample forward and backward through megatron-core's schedule, each a micro-batch of its own."""

from __future__ import annotations

from functools import partial
from typing import Any, Callable, Iterator

import torch
from megatron.core import parallel_state
from megatron.core.pipeline_parallel import get_forward_backward_func
from torch import Tensor, nn

from megatron_prune.importance.objective import Objective
from megatron_prune.runtime import cpu
from megatron_prune.text.tokens import Calibration


def backward_passes(calibration: Calibration, objective: Objective, progress: Callable[[int], None]) -> None:
    """Run the samples, padding left out; gradients are of the objective.

    Args:
        progress: called with the number of tokens of a sample once this stage has run it forward.
    """
    count, model = len(calibration.tokens), objective.model
    if not count:
        return
    longest = int(calibration.lengths.max())

    def step(iterator: Iterator[tuple[Tensor, int]], module: nn.Module):
        tokens, length = next(iterator)
        tokens = tokens[None, :longest].to(model.device)
        positions = torch.arange(longest, device=model.device)[None]
        output = module(input_ids=tokens, position_ids=positions, attention_mask=None)
        progress(length)
        if not parallel_state.is_pipeline_last_stage():
            part = objective.part(tokens, length, output)
            return output if part is None else _WithPart.apply(output, part), None
        return output, partial(loss, tokens, length)

    def loss(tokens: Tensor, length: int, output: Tensor):
        part = objective.part(tokens, length, output)
        value = output.sum() * 0.0 if part is None else part
        return value * count, value.detach()  # the schedule divides by the number of micro-batches

    with cpu.stand_in(), torch.enable_grad():
        get_forward_backward_func()(
            forward_step_func=step,
            data_iterator=iter(zip(calibration.tokens, calibration.lengths.tolist())),
            model=model.module,
            num_microbatches=count,
            seq_length=longest,
            micro_batch_size=1,
            forward_only=False,
        )


class _WithPart(torch.autograd.Function):
    """What a stage hands on, with its own part of the objective: going backward, that part's gradient is added."""

    @staticmethod
    def forward(context: Any, output: Tensor, part: Tensor) -> Tensor:
        context.save_for_backward(part)
        return output.clone()

    @staticmethod
    def backward(context: Any, gradient: Tensor) -> tuple[Tensor, Tensor]:
        (part,) = context.saved_tensors
        return gradient, torch.ones_like(part)
