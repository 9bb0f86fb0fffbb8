"""Sums over samples that hooks fill during the backward passes, and the exchange of a gradient that two stages share."""

from __future__ import annotations

from typing import Callable

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from torch import Tensor, nn


class ParameterSums:
    """Sums over samples of one parameter's gradients.

    Attributes:
        values: those wanted of ``total``, ``squares`` and ``magnitudes``, float32, shaped as the parameter.
        complete: adds to a gradient, in place, what other ranks have of it.
        show: called with every sample's gradient, which it must leave as it is, and the sample's weight.
    """

    def __init__(self, parameter: nn.Parameter, wanted: frozenset[str], weights: list[float]):
        self.values = {name: torch.zeros_like(parameter, dtype=torch.float32, requires_grad=False) for name in sorted(wanted)}
        self.complete: Callable[[Tensor], object] | None = None
        self.show: Callable[[Tensor, float], None] | None = None
        self._weights = iter(weights)

    def add(self, parameter: nn.Parameter) -> None:
        """Take the next sample's gradient away from the parameter."""
        gradient, parameter.grad = parameter.grad.float(), None
        if self.complete is not None:
            self.complete(gradient)
        weight, values = next(self._weights), self.values
        if self.show is not None:
            self.show(gradient, weight)
        if "total" in values:
            values["total"].add_(gradient, alpha=weight)
        if "squares" in values:
            values["squares"].addcmul_(gradient, gradient, value=weight)
        if "magnitudes" in values:
            values["magnitudes"].add_(gradient.abs(), alpha=weight)


class TiedGradient:
    """Joins the two parts of a tied embedding's gradient when the first and the last stage both hold the matrix.

    The last stage does not wait: a sample's backward pass reaches the first stage later. At most as many gradients are on
    their way as there are stages, since the first stage lets no more samples in.
    """

    def __init__(self, parameter: nn.Parameter):
        self._group = parallel_state.get_embedding_group()
        ranks = dist.get_process_group_ranks(self._group)
        self._first, self._last = ranks[0], ranks[-1]
        self._stages = parallel_state.get_pipeline_model_parallel_world_size()
        self._sent: list[tuple[dist.Work, Tensor]] = []
        self._connect(parameter.device)

    def _connect(self, device: torch.device) -> None:
        """Meet once: NCCL joins two ranks at their first message, which neither may wait for inside a backward pass."""
        nothing = torch.zeros(1, device=device)
        if dist.get_rank() == self._last:
            dist.send(nothing, self._first, group=self._group)
        else:
            dist.recv(nothing, self._last, group=self._group)

    def send(self, parameter: nn.Parameter) -> None:
        """Hook of the last stage's copy: its gradient leaves."""
        gradient, parameter.grad = parameter.grad.float().contiguous(), None
        self._sent.append((dist.isend(gradient, self._first, group=self._group), gradient))
        if len(self._sent) > self._stages:
            self._sent.pop(0)[0].wait()

    def add(self, gradient: Tensor) -> None:
        """On the first stage: add the last stage's part of the same sample."""
        other = torch.empty_like(gradient, memory_format=torch.contiguous_format)
        dist.recv(other, self._last, group=self._group)
        gradient.add_(other)

    def close(self) -> None:
        """Wait until everything sent has arrived."""
        for work, _ in self._sent:
            work.wait()
        self._sent.clear()
