"""Fitting all matrices of a block together to what the block should give (block reconstruction: BRECQ, Li et al. 2021, arXiv
2102.05426; here without quantisation), after least squares has fitted the last of them.

The error ``sum over tokens of w·||t - f(x)||²`` of attention (q, k, v, o) or of the feed-forward block (gate, up, down) is not
quadratic in what stands before the last matrix, so Adam (Kingma & Ba 2015) takes steps over the same text: a few passes, the
step of a matrix a share of its root mean square, falling to nothing. Every eighth sample is not fitted to but looked at after
each pass; what was best there stays, the least squares it began with included. Where the first pass does harm, it begins again
with shorter steps. No labels and no loss of the model come into it: one block, or a few layers in
a row, its inputs and its outputs.

Each rank steps its own shards. Gradients are summed over the copies, and what is fitted to at a step is the same samples at
every layout: results differ by rounding.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Callable, Iterator

import torch
from torch import Tensor, nn

from megatron_prune.planning.amounts import HELD_OUT, STEP_TOKENS
from megatron_prune.runtime.stage import Stage

RATE = 0.005
"""First step of a matrix, as a share of the root mean square of its weights."""
SLOWER = 4
"""If the first pass makes it worse, the rate is divided by this …"""
SLOWEST = 16
"""… until it has been divided by this."""


@dataclass(frozen=True, kw_only=True)
class Examples:
    """This process's samples at one block.

    Attributes:
        numbers: their places in the whole calibration, int64 [samples].
        count: samples over all copies.
        length: tokens in a sample.
        at: (indices into this process's samples) → what enters the block, what it should add, [samples, tokens, hidden],
            and the tokens' weights [samples, tokens], on the stage's device.
    """

    numbers: Tensor
    count: int
    length: int
    at: Callable[[Tensor], tuple[Tensor, Tensor, Tensor]]


def reconstruct(
    parameters: list[tuple[nn.Parameter, float]],
    forward: Callable[[Tensor], Tensor],
    examples: Examples,
    stage: Stage,
    passes: int,
    progress: Callable[[int], None] = lambda passes: None,
) -> bool:
    """Fit in place; every process takes part.

    Args:
        parameters: this rank's part of each matrix, and the root mean square of the whole matrix.
        forward: what the block adds to the stream, full on every rank.
        passes: over the samples that are fitted to.
        progress: called with the number of passes made, -1 for one that was in vain; all together ``passes``.

    Returns:
        Whether any pass did better than the start on the samples that were held out; if none did, nothing has changed.
    """
    fitted, held = fitted_and_held_out(examples.count)
    if not len(fitted):
        progress(passes)
        return False
    started = [parameter.detach().float().clone() for parameter, _ in parameters]
    best = start = _error(forward, examples, held, stage)
    if start == 0.0:
        progress(passes)
        return False
    kept = started
    for parameter, _ in parameters:
        parameter.requires_grad_(True)
    rate = RATE
    while best == start and rate >= RATE / SLOWEST:
        masters = [value.clone() for value in started]
        steps = _steps(masters, parameters, forward, examples, fitted, stage, passes, rate, start)
        for _ in steps:
            progress(1)
            error = _error(forward, examples, held, stage)
            if error < best:
                best, kept = error, [master.clone() for master in masters]
            elif best == start:
                progress(-1)
                break
        rate /= SLOWER
    _copy(kept, parameters)
    for parameter, _ in parameters:
        parameter.requires_grad_(False)
        parameter.grad = None
    if best == start:
        progress(passes)
    return best < start


def fitted_and_held_out(count: int) -> tuple[Tensor, Tensor]:
    """Numbers of the samples that are fitted to, and of every eighth, which is only looked at (the last of fewer)."""
    numbers, every = torch.arange(count), min(HELD_OUT, count)
    held = numbers % every == every - 1
    return numbers[~held], numbers[held]


def _steps(
    masters: list[Tensor],
    parameters: list[tuple[nn.Parameter, float]],
    forward: Callable[[Tensor], Tensor],
    examples: Examples,
    fitted: Tensor,
    stage: Stage,
    passes: int,
    rate: float,
    start: float,
) -> Iterator[None]:
    """Take the steps of one pass after the other, on ``masters`` and the parameters; yields after each pass."""
    groups = [{"params": [master], "lr": rate * size} for master, (_, size) in zip(masters, parameters)]
    optimizer = torch.optim.Adam(groups, betas=(0.9, 0.99), fused=True)
    each = max(1, STEP_TOKENS // examples.length)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - step / (passes * -(-len(fitted) // each)))
    draw = torch.Generator().manual_seed(0)
    _copy(masters, parameters)
    for _ in range(passes):
        for chosen in fitted[torch.randperm(len(fitted), generator=draw)].split(each):
            for parameter, _ in parameters:
                parameter.grad = torch.zeros_like(parameter)
            with torch.enable_grad():
                for batch in _mine(examples, chosen):
                    (_squares(forward, examples, batch) / start).backward()
            for master, (parameter, _) in zip(masters, parameters):
                master.grad = stage.sum_copies(parameter.grad.float())
            optimizer.step()
            schedule.step()
            _copy(masters, parameters)
        yield


def _copy(values: list[Tensor], parameters: list[tuple[nn.Parameter, float]]) -> None:
    for value, (parameter, _) in zip(values, parameters):
        parameter.data.copy_(value)


def _mine(examples: Examples, chosen: Tensor) -> Iterator[Tensor]:
    """Indices of this process's samples among those chosen, a few at a time."""
    here = torch.isin(examples.numbers, chosen).nonzero().flatten()
    return (part for part in here.split(max(1, STEP_TOKENS // examples.length)) if len(part))


def _squares(forward: Callable[[Tensor], Tensor], examples: Examples, batch: Tensor) -> Tensor:
    stream, wanted, weights = examples.at(batch)
    return ((forward(stream) - wanted).float().square().sum(dim=-1) * weights).sum()


def _error(forward: Callable[[Tensor], Tensor], examples: Examples, chosen: Tensor, stage: Stage) -> float:
    """Sum over the chosen samples of all copies; the same on every process."""
    with torch.no_grad():
        total = torch.zeros((), dtype=torch.float64, device=stage.device)
        for batch in _mine(examples, chosen):
            total += _squares(forward, examples, batch).double()
    return stage.agreed(stage.sum_copies(total).item())
