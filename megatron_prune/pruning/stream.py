"""The basis that the stream of a pruned model is cut in."""

from __future__ import annotations

from torch import Tensor

from megatron_prune.arch.model import ModelConfig
from megatron_prune.errors import InputError
from megatron_prune.importance.statistics import Statistics
from megatron_prune.planning.plan import Plan
from megatron_prune.pruning.measure import Subject
from megatron_prune.runtime.ends import final_norm_factors
from megatron_prune.surgery.basis import (
    FINAL_SHARE,
    LARGEST_SPREAD,
    Basis,
    denominator_spread,
    massive_channels,
    rotation,
    selection,
    tied_rotation,
    tied_scale,
)

TOO_VARIED = "the final norm varies too much"


def stream_basis(plan: Plan, subject: Subject, statistics: Statistics | None) -> Basis:
    """The basis of the pruned stream.

    Args:
        statistics: with the stream's second moments, for a plan that rotates it.

    Raises:
        InputError: if a tied head stands in the way of a rotation.
    """
    if plan.hidden is not None:
        return selection(plan.hidden, subject.config.hidden_size)
    if not plan.rotated:
        return Basis()
    moment, width = statistics.stream_moment(FINAL_SHARE), plan.new["hidden_size"]
    if not plan.new_config(subject.config).tie_embeddings:
        return rotation(moment, width)
    spread = tied_spread(subject, statistics, moment, width)
    if spread > LARGEST_SPREAD:
        raise InputError(
            f"{TOO_VARIED} for a rotation that keeps the head tied to the embedding",
            got=f"norms disturbed by {spread:.3f} at full width, before any cut",
            needed=f"at most {LARGEST_SPREAD}",
            do="store the head as a matrix of its own with --untie, or cut channels as they are with --hidden-method select",
        )
    return tied_rotation(moment, _final_norm(subject), width)


def rotates_well(new: ModelConfig, subject: Subject, statistics: Statistics) -> bool:
    """Whether the stream can be rotated to the width of the pruned model, whose head may stay tied."""
    if not new.tie_embeddings or new.hidden_size == subject.config.hidden_size:
        return True
    return tied_spread(subject, statistics, statistics.stream_moment(FINAL_SHARE), new.hidden_size) <= LARGEST_SPREAD


def tied_spread(subject: Subject, statistics: Statistics, moment: Tensor, width: int) -> float:
    """How much a rotation to ``width`` that keeps the head tied disturbs the norms, before any cut.

    Args:
        moment: float64 [hidden, hidden], the stream's second moments.
    """
    weight = _final_norm(subject)
    streams = [statistics.layer(layer).last for layer in (*range(subject.config.num_layers), None)]
    return denominator_spread(tied_scale(weight, massive_channels(moment, weight, width)), streams)


def _final_norm(subject: Subject) -> Tensor:
    return final_norm_factors(subject.tensors).double()
