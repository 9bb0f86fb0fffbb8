"""Mean losses of the model without each of its layers: what ``metrics/perplexity.py`` compares."""

from __future__ import annotations

import contextlib
from typing import Callable, Iterator

import torch
from megatron.core import parallel_state
from torch import Tensor

from megatron_prune.errors import InputError
from megatron_prune.importance.statistics import Statistics, read_all, replace_file
from megatron_prune.planning.amounts import BATCH_TOKENS
from megatron_prune.runtime.forward import token_losses
from megatron_prune.runtime.model import RunningModel
from megatron_prune.runtime.world import World
from megatron_prune.text.tokens import Calibration


def collect_losses(
    model: RunningModel,
    calibration: Calibration,
    statistics: Statistics,
    world: World,
    *,
    progress: Callable[[int], None] = lambda count: None,
) -> None:
    """Fill ``losses.safetensors`` with float64 [layers + 1]: without layer 0, 1, …, and of the whole model.

    A loss is the mean over samples, by their weights, of a sample's mean next-token cross-entropy. The file is written after
    every layer, so that a stopped run goes on where it was. Every process takes part.

    Args:
        progress: called with the number of tokens that went through the model.

    Raises:
        InputError: if a loss is not finite.
    """
    path, layers = statistics.folder / "losses.safetensors", model.config.num_layers
    unknown = torch.full((layers + 1,), torch.nan, dtype=torch.float64)
    kept = read_all(path).get("losses", unknown) if world.is_main else unknown
    losses = torch.tensor(world.all_gather(kept.tolist())[0], dtype=torch.float64)
    for place in (layers, *range(layers)):
        if not losses[place].isnan():
            continue
        with contextlib.nullcontext() if place == layers else without_layer(model, place):
            losses[place] = mean_loss(model, calibration, world)
        if not losses[place].isfinite():
            what = "the model" if place == layers else f"the model without layer {place}"
            raise InputError(
                f"the loss of {what} is not finite (NaN or infinity) on this text",
                do="look for broken weights with megatron-prune inspect --weights, or compute with --dtype fp32",
            )
        world.on_main(lambda: replace_file(path, {"losses": losses}))
        progress(calibration.tokens.numel())
    world.barrier()


@contextlib.contextmanager
def without_layer(model: RunningModel, layer: int) -> Iterator[None]:
    """A global layer hands its input on; nothing changes on stages that do not hold it."""
    held = model.layout.stage_layers(parallel_state.get_pipeline_model_parallel_rank(), model.config.num_layers)
    if layer not in held:
        yield
        return
    module = model.module.decoder.layers[layer - held.start]
    module.forward = lambda hidden_states, *_, **__: (hidden_states, None)
    try:
        yield
    finally:
        del module.forward


def mean_loss(model: RunningModel, calibration: Calibration, world: World) -> float:
    """Mean over samples, by their weights, of the mean cross-entropy of a sample's tokens; the same on every process."""
    mine = calibration.share(parallel_state.get_data_parallel_rank(), parallel_state.get_data_parallel_world_size())
    total = 0.0
    if len(mine.tokens):
        longest = int(mine.lengths.max())
        each = min(len(mine.tokens), max(1, BATCH_TOKENS // longest))
        numbers = torch.arange(-(-len(mine.tokens) // each) * each)  # the last sample repeats to fill a batch, uncounted
        batches = mine.tokens[numbers.clamp(max=len(mine.tokens) - 1), :longest].split(each)
        losses = token_losses(model, list(batches))
        if losses and parallel_state.get_tensor_model_parallel_rank() == 0:
            total = (_sample_means(torch.cat(losses)[: len(mine.tokens)], mine.lengths) * mine.weights).sum().item()
    return sum(world.all_gather(total)) / calibration.weights.sum().item()


def _sample_means(losses: Tensor, lengths: Tensor) -> Tensor:
    """float64 [samples] of [samples, tokens - 1]; padding does not count."""
    inside = torch.arange(losses.shape[1])[None] < (lengths - 1)[:, None]
    return losses.double().masked_fill(~inside, 0.0).sum(dim=1) / (lengths - 1)
