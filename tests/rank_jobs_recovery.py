"""What ranks run to train: plain functions of a module that spawned processes can import. Tensors travel as numpy."""

from __future__ import annotations

from typing import Any

import numpy
import torch

from megatron_prune.arch.sharding import ParallelLayout
from megatron_prune.runtime.world import World


def losses(world: World, tp: int, vocab_size: int, case: dict[str, Any]) -> tuple[numpy.ndarray, numpy.ndarray]:
    """``vocab_parallel_losses`` on this rank's columns → losses [3, tokens, batch], gradient of the logits' columns.

    Args:
        case: ``logits`` [tokens, batch, padded vocabulary], ``labels``, ``upstream`` [tokens, batch], ``dtype``, and
            ``teacher`` logits, or ``ids`` and ``log_probs``, with ``weight`` and ``temperature``.
    """
    from rank_jobs import forget_groups

    from megatron_prune.recovery.loss import Distillation, TeacherLogits, TeacherTopK, vocab_parallel_losses
    from megatron_prune.runtime.model import start_parallel, stop_parallel

    start_parallel(ParallelLayout(tensor=tp), world)
    try:
        from megatron.core import parallel_state

        width = case["logits"].shape[-1] // tp
        first = width * parallel_state.get_tensor_model_parallel_rank()
        dtype = getattr(torch, case["dtype"])
        cut = lambda whole: torch.from_numpy(whole)[..., first : first + width].to(dtype).clone()
        teacher = None
        if "teacher" in case:
            teacher = TeacherLogits(logits=cut(case["teacher"]))
        elif "ids" in case:
            teacher = TeacherTopK(ids=torch.from_numpy(case["ids"]), log_probs=torch.from_numpy(case["log_probs"]).float())
        distillation = Distillation(weight=case["weight"], temperature=case["temperature"])
        leaf = cut(case["logits"]).requires_grad_()
        labels = torch.from_numpy(case["labels"])
        found = vocab_parallel_losses(leaf * 1.0, labels, vocab_size, teacher, distillation)
        found[0].backward(torch.from_numpy(case["upstream"]).float())
        return torch.stack(found).detach().numpy(), leaf.grad.float().numpy()
    finally:
        stop_parallel()
        forget_groups()
