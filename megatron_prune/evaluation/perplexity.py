"""Perplexity of a running model under TP × PP × DP."""

from __future__ import annotations

import math

import torch
from megatron.core import parallel_state

from megatron_prune.runtime.forward import token_losses
from megatron_prune.runtime.model import RunningModel
from megatron_prune.runtime.world import World


def perplexity(model: RunningModel, windows: torch.Tensor, world: World, *, micro_batch_size: int = 1) -> float:
    """``exp`` of the mean next-token cross-entropy over all windows (each window counts alike).

    Args:
        windows: int64 [windows, tokens]; data-parallel copies take turns. The last ones are repeated, uncounted,
            where they do not fill a batch on every copy.

    Returns:
        The same value on every process; NaN or infinity where a loss is not finite.
    """
    copies, copy = parallel_state.get_data_parallel_world_size(), parallel_state.get_data_parallel_rank()
    each = -(-len(windows) // (copies * micro_batch_size)) * micro_batch_size
    numbers = torch.arange(each * copies).view(copies, each)[copy]
    batches = windows[numbers.clamp(max=len(windows) - 1)].split(micro_batch_size)
    losses = token_losses(model, list(batches))
    total = counted = 0.0
    if losses and parallel_state.get_tensor_model_parallel_rank() == 0:
        means = torch.cat(losses).double().mean(dim=1)[numbers < len(windows)]
        total, counted = means.sum().item(), float(len(means))
    sums = [sum(column) for column in zip(*world.all_gather((total, counted)))]
    loss = sums[0] / sums[1]
    return math.exp(min(loss, 700.0)) if math.isfinite(loss) else loss
