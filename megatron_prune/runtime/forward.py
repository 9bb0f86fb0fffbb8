"""Forward passes through megatron-core's pipeline schedule: logits and losses, at any TP × PP."""

from __future__ import annotations

from functools import partial
from typing import Any, Callable, Iterator

import torch
from megatron.core import parallel_state
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.core.tensor_parallel import vocab_parallel_cross_entropy
from megatron.core.tensor_parallel.mappings import gather_from_tensor_model_parallel_region

from megatron_prune.runtime import cpu
from megatron_prune.runtime.model import RunningModel


def forward(model: RunningModel, batches: list[torch.Tensor], collect: Callable[[torch.Tensor, torch.Tensor], Any]) -> list[Any]:
    """Run token batches through all stages.

    Args:
        batches: int64 [batch, tokens] each, all of one shape, the same on every rank of a data-parallel copy.
        collect: (local logits [batch, tokens, padded vocabulary / TP], tokens) → what to keep.

    Returns:
        One result per batch on the last stage; an empty list on the others.
    """

    def step(iterator: Iterator[torch.Tensor], module: torch.nn.Module):
        tokens = next(iterator).to(model.device)
        positions = torch.arange(tokens.shape[1], device=model.device).expand_as(tokens)
        output = module(input_ids=tokens, position_ids=positions, attention_mask=None)
        return output, partial(keep, tokens)

    def keep(tokens: torch.Tensor, output: torch.Tensor, non_loss_data: bool = True) -> Any:
        return collect(mask_padding(output, model), tokens)

    with cpu.stand_in(), torch.no_grad():
        kept = get_forward_backward_func()(
            forward_step_func=step,
            data_iterator=iter(batches),
            model=model.module,
            num_microbatches=len(batches),
            seq_length=batches[0].shape[1],
            micro_batch_size=batches[0].shape[0],
            forward_only=True,
            collect_non_loss_data=True,
        )
    return kept if parallel_state.is_pipeline_last_stage() else []


def mask_padding(logits: torch.Tensor, model: RunningModel) -> torch.Tensor:
    """Make the vocabulary's padding impossible, so that it takes no probability."""
    width = logits.shape[-1]
    real = model.config.vocab_size - width * parallel_state.get_tensor_model_parallel_rank()
    if real < width:
        logits = logits.clone()
        logits[..., max(0, real) :] = torch.finfo(logits.dtype).min
    return logits


def full_logits(model: RunningModel, batches: list[torch.Tensor]) -> list[torch.Tensor]:
    """Logits, float32 [batch, tokens, vocabulary] per batch, full on every rank of the last stage."""

    def gather(logits: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
        whole = gather_from_tensor_model_parallel_region(logits.contiguous())
        return whole[..., : model.config.vocab_size].float().cpu()

    return forward(model, batches, gather)


def token_losses(model: RunningModel, batches: list[torch.Tensor]) -> list[torch.Tensor]:
    """Next-token cross-entropies in nats, float32 [batch, tokens - 1] per batch, on the ranks of the last stage."""

    def loss(logits: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
        logits = logits[:, :-1].float().transpose(0, 1).contiguous()
        labels = tokens[:, 1:].transpose(0, 1).contiguous()
        return vocab_parallel_cross_entropy(logits, labels).transpose(0, 1).cpu()

    return forward(model, batches, loss)
