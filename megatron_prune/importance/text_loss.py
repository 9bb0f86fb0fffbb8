"""The loss of a model on text, from the streams after its last layer."""

from __future__ import annotations

from typing import Callable

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from megatron_prune.arch.model import ModelConfig
from megatron_prune.arch.tensors import head_of
from megatron_prune.checkpoint.tensor_map import TensorMap
from megatron_prune.importance.walk import Walk
from megatron_prune.runtime.ends import final_norm_factors, norm


def mean_loss(walk: Walk, tensors: TensorMap, among: Tensor | None = None) -> float:
    """Mean next-token cross-entropy of a walk at its end, weighted, in nats; the same on every process.

    Args:
        tensors: of the model that was walked through.
        among: numbers of the samples that count, int64; ``None`` for all.
    """
    losses = next_token_losses(tensors, walk.stage.device)
    sums = torch.zeros(2, dtype=torch.float64, device=walk.stage.device)
    for place in range(len(walk.numbers)) if among is None else torch.isin(walk.numbers, among).nonzero().flatten():
        counted = walk.on_device(walk.weights[place])[1:]
        found = losses(walk.on_device(walk.stream[place]), walk.on_device(walk.tokens[place]))
        sums += torch.stack([(found * counted).sum(), counted.sum()]).double()
    total, count = walk.stage.sum_copies(sums).tolist()
    return walk.stage.agreed(total / count)


def next_token_losses(tensors: TensorMap, device: torch.device) -> Callable[[Tensor, Tensor], Tensor]:
    """A function that tells what a model loses on a sample: the stream after its last layer, [tokens, hidden], and the sample's
    tokens → cross-entropies from the second token on, float32 [tokens - 1]."""
    config = tensors.config
    factors = final_norm_factors(tensors).float().to(device)
    head = tensors.read_block(head_of(config), range(config.vocab_size), range(config.hidden_size)).float().to(device)
    return lambda stream, tokens: token_losses(stream, tokens, factors, head, config)


def token_losses(stream: Tensor, tokens: Tensor, factors: Tensor, head: Tensor, config: ModelConfig) -> Tensor:
    """Cross-entropies of a sample's tokens from the second on, float32 [tokens - 1].

    Args:
        stream: after the last layer, [tokens, hidden].
        factors: of the final norm, [hidden].
        head: [vocabulary, hidden].
    """
    logits = (norm(stream.float(), config) * factors)[:-1] @ head.T
    return cross_entropy(logits, tokens[1:], reduction="none")
