"""Losses over a vocabulary that is split over the tensor-parallel ranks, without gathering the logits.

Softmax and its gradient are computed together, rows at a time and in the memory of the logits, so that no second tensor
of their size exists. What ranks exchange is a few numbers a token (Shoeybi et al. 2019, arXiv 1909.08053, section 3).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from torch import Tensor

_ROWS_ELEMENTS = 1 << 22
"""Logits that go through the arithmetic together: what they make of temporaries stays near the processor."""


_NO_REST = 1e-5
"""Probability below which a teacher has listed everything: what float32 sums leave."""


@dataclass(frozen=True, kw_only=True, eq=False)
class TeacherLogits:
    """The unpruned model's logits for the tokens of a micro-batch.

    Attributes:
        logits: [tokens, batch, padded vocabulary / TP], this rank's part.
    """

    logits: Tensor


@dataclass(frozen=True, kw_only=True, eq=False)
class TeacherTopK:
    """The unpruned model's most probable tokens, from a file.

    Attributes:
        ids: int64 [tokens, batch, k], of the whole vocabulary.
        log_probs: float32 [tokens, batch, k], at the temperature of the distillation, of the full distribution.
    """

    ids: Tensor
    log_probs: Tensor


@dataclass(frozen=True, kw_only=True)
class Distillation:
    """How the teacher counts.

    ``(1 - weight) · cross-entropy + weight · T² · KL(teacher ‖ student)``, both distributions at temperature T
    (Hinton et al. 2015, arXiv 1503.02531).
    """

    weight: float = 1.0
    temperature: float = 1.0


def vocab_parallel_losses(
    logits: Tensor,
    labels: Tensor,
    vocab_size: int,
    teacher: TeacherLogits | TeacherTopK | None = None,
    distillation: Distillation = Distillation(weight=0.0),
) -> tuple[Tensor, Tensor, Tensor]:
    """Losses in nats, float32 [tokens, batch] each: what is trained, the cross-entropy, the KL divergence.

    Against a teacher's top k, the tokens it does not list count as one (Anshumann et al. 2025, arXiv 2503.16870, "ghost
    token"): with k the whole vocabulary this is the full divergence, with less a lower bound of it.

    Args:
        logits: [tokens, batch, padded vocabulary / TP], this rank's part; its memory is overwritten.
        labels: int64 [tokens, batch].
        vocab_size: tokens without padding; padding takes no probability.

    Returns:
        Alike on all ranks; only the first carries a gradient.
    """
    return _Losses.apply(logits, labels, vocab_size, teacher, distillation)


class _Losses(torch.autograd.Function):
    @staticmethod
    def forward(ctx, logits, labels, vocab_size, teacher, distillation):
        width = logits.shape[-1]
        first = width * parallel_state.get_tensor_model_parallel_rank()
        real = min(max(vocab_size - first, 0), width)
        needs_grad = logits.requires_grad
        memory = logits.detach()
        rows, flat = memory.reshape(-1, width), labels.reshape(-1)
        assert rows.data_ptr() == memory.data_ptr()
        losses = torch.empty(3, len(rows), dtype=torch.float32, device=rows.device)
        together = max(1, _ROWS_ELEMENTS // width)
        for start in range(0, len(rows), together):
            part = slice(start, min(start + together, len(rows)))
            taught = None if teacher is None else _rows_of(teacher, part, real)
            here = rows[part, :real]
            gradient = _some_rows(here, flat[part] - first, taught, distillation, losses[:, part], first, needs_grad)
            if needs_grad:
                if gradient is not here:
                    here.copy_(gradient)
                rows[part, real:].zero_()
        ctx.gradient = memory if needs_grad else None
        total, cross_entropy, divergence = losses.view(3, *labels.shape).unbind()
        ctx.mark_non_differentiable(cross_entropy, divergence)
        return total, cross_entropy, divergence

    @staticmethod
    def backward(ctx, of_total, *_):
        return ctx.gradient.mul_(of_total.unsqueeze(-1)), None, None, None, None


def _rows_of(teacher: TeacherLogits | TeacherTopK, part: slice, real: int) -> TeacherLogits | TeacherTopK:
    if isinstance(teacher, TeacherLogits):
        return TeacherLogits(logits=teacher.logits.reshape(-1, teacher.logits.shape[-1])[part, :real].float())
    k = teacher.ids.shape[-1]
    return TeacherTopK(ids=teacher.ids.reshape(-1, k)[part], log_probs=teacher.log_probs.reshape(-1, k)[part])


def _some_rows(logits, labels, teacher, distillation, losses, first, needs_grad) -> Tensor | None:
    """Losses of some tokens into ``losses`` [3, rows], and the gradient of the first with respect to their logits.

    Args:
        logits: [rows, real vocabulary here].
        labels: int64 [rows], counted from this rank's first token.
    """
    logits = logits.float()
    here = ((labels >= 0) & (labels < logits.shape[1])).float()
    local = labels.clamp(0, max(logits.shape[1] - 1, 0)).unsqueeze(1)
    of_label = logits.gather(1, local).squeeze(1) * here if logits.shape[1] else here
    exponents, peak, total = _exponents(logits, in_place=needs_grad and teacher is None)
    of_label = _sum(of_label)
    log_total = total.log() + peak
    losses[1] = log_total - of_label
    losses[2] = 0.0
    weight, temperature = (0.0, 1.0) if teacher is None else (distillation.weight, distillation.temperature)
    gradient = None
    if teacher is not None:
        hot = (exponents, log_total) if temperature == 1.0 else None
        compare = _against_logits if isinstance(teacher, TeacherLogits) else _against_top_k
        losses[2], gradient = compare(logits / temperature if hot is None else logits, teacher, temperature, hot, first)
    losses[0] = (1.0 - weight) * losses[1] + weight * temperature**2 * losses[2]
    if not needs_grad:
        return None
    own = exponents.div_(total.unsqueeze(1))
    if own.shape[1]:
        own.scatter_add_(1, local, -here.unsqueeze(1))
    return own if gradient is None else own.mul_(1.0 - weight).add_(gradient, alpha=weight * temperature)


def _exponents(logits: Tensor, *, in_place: bool = False) -> tuple[Tensor, Tensor, Tensor]:
    """exp(logits - peak) [rows, columns], the peak and the sum of them over all ranks [rows]."""
    peak = logits.amax(1) if logits.shape[1] else logits.new_full((len(logits),), -torch.inf)
    peak = _reduce(peak, dist.ReduceOp.MAX)
    exponents = (logits.sub_(peak.unsqueeze(1)) if in_place else logits - peak.unsqueeze(1)).exp_()
    return exponents, peak, _sum(exponents.sum(1))


def _against_logits(hot, teacher, temperature, known, first) -> tuple[Tensor, Tensor]:
    """KL(teacher ‖ student) [rows] and its gradient with respect to ``hot``, the student's logits / temperature."""
    exponents, log_total = known or _with_log_total(hot)
    taught = teacher.logits / temperature if temperature != 1.0 else teacher.logits
    target, log_target = _with_log_total(taught)
    target = target.div_(_sum(target.sum(1)).unsqueeze(1))
    divergence = _sum((target * (taught - hot)).sum(1)) - log_target + log_total
    own = (hot - log_total.unsqueeze(1)).exp_()
    return divergence, own.sub_(target)


def _with_log_total(logits: Tensor) -> tuple[Tensor, Tensor]:
    exponents, peak, total = _exponents(logits)
    return exponents, total.log_().add_(peak)


def _against_top_k(hot, teacher, temperature, known, first) -> tuple[Tensor, Tensor]:
    """As :func:`_against_logits`; what the teacher does not list is one token."""
    columns = teacher.ids - first
    here = (columns >= 0) & (columns < hot.shape[1])
    local = columns.clamp(0, max(hot.shape[1] - 1, 0))
    _, log_total = known or _with_log_total(hot)
    own = (hot - log_total.unsqueeze(1)).exp_()
    target = teacher.log_probs.exp()
    picked = own.gather(1, local) if hot.shape[1] else torch.zeros_like(target)
    of_listed = hot.gather(1, local) * here if hot.shape[1] else torch.zeros_like(target)
    listed = _sum(of_listed) - log_total.unsqueeze(1)
    rest = 1.0 - target.sum(1)
    rest = torch.where(rest > _NO_REST, rest, 0.0)
    rows, places = here.nonzero(as_tuple=True)
    own[rows, local[rows, places]] = 0.0
    own_rest = _sum(own.sum(1)).clamp_(min=torch.finfo(torch.float32).tiny)
    divergence = (target * (teacher.log_probs - listed)).sum(1)
    divergence += torch.where(rest > 0, rest * (rest.clamp(min=_NO_REST).log() - own_rest.log()), 0.0)
    gradient = own.sub_((own / own_rest.unsqueeze(1)).mul_(rest.unsqueeze(1)))
    gradient[rows, local[rows, places]] = (picked - target)[rows, places]
    return divergence, gradient


def _sum(values: Tensor) -> Tensor:
    return _reduce(values, dist.ReduceOp.SUM)


def _reduce(values: Tensor, operation: dist.ReduceOp) -> Tensor:
    if parallel_state.get_tensor_model_parallel_world_size() > 1:
        dist.all_reduce(values, operation, group=parallel_state.get_tensor_model_parallel_group())
    return values
