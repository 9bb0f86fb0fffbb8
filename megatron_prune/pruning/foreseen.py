"""A pruning foreseen from a model's sizes alone: the shape that it reaches, and the passes that it makes."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any, NamedTuple

from megatron_prune.arch.model import ModelConfig
from megatron_prune.arch.sharding import ParallelLayout
from megatron_prune.config import flag
from megatron_prune.errors import InputError
from megatron_prune.families.choice import choose_family
from megatron_prune.families.family import Family
from megatron_prune.planning.loss_weights import even_loss, rank_candidates
from megatron_prune.pruning.asked import quickened, sample_length, wants_text
from megatron_prune.pruning.flags import check_effect
from megatron_prune.pruning.options import ChoosingOptions, CostOptions, DivisionOptions
from megatron_prune.pruning.passes import Reading, passes_of, sites_of
from megatron_prune.pruning.request import Request, read_request
from megatron_prune.serving.demand import demanded
from megatron_prune.text.data_specs import parse_data


class ElementType(NamedTuple):
    """Of stored weights."""

    itemsize: int


@dataclass(frozen=True, kw_only=True)
class Described:
    """A model of which its description alone was read.

    Attributes:
        template: the ``config.json`` that it descends from, if it is kept.
        dtype: of its weights.
        identity: of its values, which nobody looked at.
    """

    config: ModelConfig
    family: Family
    template: dict[str, Any] | None
    dtype: ElementType
    identity: None = None


class Foreseen(NamedTuple):
    """What a pruning will come to.

    Attributes:
        target: the shape; within a budget the one that is first where every unit counts the same.
        among: shapes within the budget; ``None`` without one.
        passes: labels of the passes over text (``passes.PASSES``), in their order.
        sites: what second moments are taken of.
        samples, sample_length: the text.
        reconstruct: passes of joint fits.
        fits: models that are fitted.
    """

    target: ModelConfig
    among: int | None
    passes: list[str]
    sites: frozenset[str]
    samples: int
    sample_length: int
    reconstruct: int
    fits: int


def check_idle(options: CostOptions) -> None:
    """Refuse what is asked of a pruning of which no shape is named.

    Raises:
        InputError: naming the flags.
    """
    items = [item for kind in (CostOptions, DivisionOptions) for item in dataclasses.fields(kind)]
    if idle := [flag(item.name) for item in items if getattr(options, item.name) != item.default]:
        do = "name one: --ratio 0.25, --num-layers-remain 24 …; or leave it out"
        raise InputError(f"{', '.join(idle)} without a shape to prune to", do=do)


def foresee(asked: ChoosingOptions, model: Described, layout: ParallelLayout, division: DivisionOptions) -> Foreseen:
    """What ``prune`` will come to, by the same checks of the same options.

    Raises:
        InputError: as ``prune`` does; of layers dealt out free in a model whose layers differ, since no one shape is known.
    """
    config, text = model.config, wants_text(asked)
    asked = quickened(asked, config, text=text)
    refit = text and asked.refit is not False
    demand = demanded(asked.serve, choose_family(model.family, division.target_family, config), model.template)
    how = {"prune_type": division.prune_type, "has_text": text, "refit": asked.refit is not False}
    request = read_request(asked, model, layout, demand, **how)
    check_effect(asked, request, config, text=text, refit=refit)
    reading = Reading(text=text, data=asked.data, costs=bool(request.probed_axes()), refit=refit)
    return Foreseen(
        target=_target(request, config),
        among=None if request.bounds is None else len(request.shapes),
        passes=passes_of(request, config, reading),
        sites=sites_of(request, config, reading),
        samples=asked.nsamples * len(parse_data(asked.data)),
        sample_length=sample_length(asked, config),
        reconstruct=asked.reconstruct,
        fits=max(1, min(asked.search, len(request.shapes))),
    )


def _target(request: Request, config: ModelConfig) -> ModelConfig:
    if request.bounds is not None and not request.shapes:
        what = "--allocate free of a model whose layers differ already: which shape that becomes is known when it is measured"
        raise InputError(what, do="name sizes by layer (--layer-sizes), or a plan, and estimate these")
    if request.plan is not None:
        shape = request.plan.new_config(config)
    elif request.target is not None:
        shape = request.target.config
    else:
        shape = rank_candidates(config, list(request.shapes), even_loss(config))[0][1]
    tokens = request.vocab_plan
    return shape if tokens is None else dataclasses.replace(shape, vocab_size=len(tokens.vocab))
