"""Flags of a pruning that a run would not look at: refused, since whoever passes one expects something of it.

``--metric``, ``--prune-type`` and ``--seed`` are rules for all that may be cut, ``--nsamples`` and ``--data-field`` for all text that
may be read beside ``--scores``: scripts give them whatever is. ``--seq-length`` is among the arguments that users of Megatron give
every program.
"""

from __future__ import annotations

from typing import Iterator

from megatron_prune.arch.model import ModelConfig
from megatron_prune.config import flag
from megatron_prune.errors import InputError
from megatron_prune.pruning.metric_facts import metric_facts
from megatron_prune.pruning.request import Request

REFIT = ("sequential", "ridge", "reader_ridge", "reconstruct")
TEXT = ("data", "data_field", "nsamples", "dtype")


def check_effect(options, request: Request, config: ModelConfig, *, text: bool, refit: bool) -> None:
    """Refuse options of a pruning (``FitOptions`` and ``TargetOptions``) that were given and change nothing.

    Args:
        text: whether text or scores are there at all.
        refit: whether what stays is re-fitted.

    Raises:
        InputError: naming the flags and what they need.
    """
    for names, why, do in _idle(options, request, config, text, refit):
        given = [flag(name) for name in names if _is_given(options, name)]
        if given:
            raise InputError(f"{', '.join(given)} {why}", do=do)


def _is_given(options, name: str) -> bool:
    """Whether an option differs from its default."""
    item = options.__dataclass_fields__.get(name)
    return item is not None and getattr(options, name) != item.default


def _idle(options, request: Request, config: ModelConfig, text: bool, refit: bool) -> Iterator[tuple[tuple[str, ...], str, str]]:
    """(options, why they change nothing, what to do) of what this run does not look at."""
    if not (refit and request.shapes):
        do = "name a budget (--params, --ratio, --memory) and text, without --no-refit"
        yield ("search",), "compares re-fitted models of several shapes", do
    if not refit:
        yield REFIT, "where nothing is re-fitted", "leave it out, or re-fit: name text with --data, without --no-refit"
    if options.memory is None:
        yield ("memory_seq_length", "memory_batch"), "without --memory", "leave it out"
    if request.bounds is None:
        yield ("allocate",), "without a budget", "name one (--params, --ratio, --memory), or leave it out"
    if not request.probed_axes():
        yield ("min_layer_ratio", "max_layer_ratio"), "without --allocate free", "leave it out"
    axes = request.axes(config)
    used = {request.metric_of[axis] for axis in axes}
    measured = refit or any(metric_facts(name).needs for name in used)
    if not (text and measured):
        why = "where no text is read: nothing is re-fitted, and no metric that is used measures on it"
        yield (*TEXT, "scores"), why, "leave it out, or ask for what needs text"
        if request.vocab_plan is None:
            yield ("tokenizer",), why, "leave it out"
    if request.target is None:  # of shapes within a budget nobody knows which axes they cut
        return
    if "layer" not in axes:
        yield ("depth_metric",), "where scores choose no layer", "leave it out, or ask for --num-layers-remain"
    if request.target.config.hidden_size == config.hidden_size:
        yield ("hidden_method",), "where no hidden unit is cut", "leave it out, or ask for --hidden-size-remain"
