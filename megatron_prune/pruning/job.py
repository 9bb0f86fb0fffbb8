"""One pruning, settled before anything is measured."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from megatron_prune.arch.model import ModelConfig
from megatron_prune.errors import InputError
from megatron_prune.families.family import Family
from megatron_prune.importance.artifact import scores_digest
from megatron_prune.importance.metric import metric_named
from megatron_prune.planning.costs_file import CostsManifest, has_costs
from megatron_prune.planning.target import NO_ROTATION
from megatron_prune.pruning.asked import quickened, wants_text
from megatron_prune.pruning.flags import check_effect
from megatron_prune.pruning.measure import Subject, check_measurable, check_text, request_key
from megatron_prune.pruning.options import CalibrationOptions, ChoosingOptions, FitOptions, TargetOptions
from megatron_prune.pruning.request import Request, read_request
from megatron_prune.pruning.scored import check_scores, kept_metrics
from megatron_prune.pruning.tokens import kept_vocabulary
from megatron_prune.runtime.reporting import log
from megatron_prune.serving.demand import Demand, demanded, warnings
from megatron_prune.serving.options import ServeOptions
from megatron_prune.serving.runtime import RUNTIMES
from megatron_prune.text.sources import check_seed
from megatron_prune.vocabulary.trimmed import Trimmed


@dataclass(frozen=True, kw_only=True)
class Job:
    """What is cut of which model, how that is chosen and how what stays is fitted.

    Attributes:
        options: the text, and what is computed in.
        measured: whether that text is read.
        kept_scores: directory of scores that take the place of measuring.
        prune_type: which units each tensor-parallel rank keeps.
        search: shapes within a budget that are fitted and compared.
        fit: how what stays is re-fitted; ``None``: not at all.
        trimmed: the tokenizer that goes with the tokens that stay; ``None``: all do.
        fold: whether the head's rows are fitted to take over what dropped tokens said.
        made_by: the record of all that, for the plan.
        asked: further options that a stopped run must have been given to be gone on with.
    """

    subject: Subject
    request: Request
    options: CalibrationOptions
    measured: bool = False
    kept_scores: Path | None = None
    prune_type: str = "balance"
    search: int = 1
    fit: FitOptions | None = None
    trimmed: Trimmed | None = None
    fold: bool = False
    made_by: dict[str, Any] = field(default_factory=dict)
    asked: dict[str, Any] = field(default_factory=dict)

    @property
    def measures_costs(self) -> bool:
        """Whether costs of blocks are measured: they are asked for, and none lie beside the scores."""
        return bool(self.request.probed_axes()) and not (self.kept_scores and has_costs(self.kept_scores))

    def key(self) -> str:
        """What a stopped run must have been to be gone on with."""
        plan = self.request.plan.with_tokens_of(self.request.vocab_plan).dumps() if self.request.plan else None
        scores = scores_digest(self.kept_scores) if self.kept_scores else None
        return request_key(self.options, self.subject, **{**self.asked, "plan": plan, "scores": scores, "made_by": self.made_by})


def settle(options: ChoosingOptions, subject: Subject, family: Family, *, prune_type: str) -> Job:
    """Check all that can be checked before anything is measured.

    Args:
        family: what the result is written as.

    Raises:
        InputError: on options, a plan, scores or a tokenizer that do not fit the model or each other.
    """
    config, layout, text = subject.config, subject.layout, wants_text(options)
    options = quickened(options, config, text=text)
    refit = text and options.refit is not False
    demand = demanded(options.serve, family, subject.model.template)
    request = read_request(
        options,
        subject.model,
        layout,
        demand,
        prune_type=prune_type,
        has_text=text,
        held=kept_metrics(options),
        refit=options.refit is not False,
    )
    trimmed = kept_vocabulary(options, request, subject.model)
    kept_scores = Path(options.scores) if options.scores else None
    if kept_scores is None:
        subject.engine.check_metrics(sorted({*request.metrics(config), *request.fallback_metrics(config)}))
    if subject.world.is_main:
        for line in _unserved(request, demand, config):
            log.warning("%s", line)
    check_seed(options.seed)
    check_effect(options, request, config, text=text, refit=refit)
    if text and not (kept_scores and options.data is None):
        check_text(options, subject)
    if text and kept_scores:
        check_scores(kept_scores, request, subject)
        if request.probed_axes() and has_costs(kept_scores):
            wanted = {axis: request.metric_of[axis] for axis in request.probed_axes()}
            CostsManifest.load(kept_scores).check(subject.model.identity, wanted, kept_scores)
    elif text:
        check_measurable(options, request.metrics(config), config, layout)
    if text and not refit and request.rotates(config):
        raise InputError("--no-refit with rotated hidden units", do="use --hidden-method select, or re-fit")
    if options.plan and not text and options.refit is None and subject.world.is_main:
        log.warning(
            "the plan is applied as it is, nothing is re-fitted: name text with --data, or pass --refit for the model's own samples, "
            "and what stays learns to do what the whole did"
        )
    return Job(
        subject=subject,
        request=request,
        options=options,
        measured=text,
        kept_scores=kept_scores,
        prune_type=prune_type,
        search=options.search,
        fit=options if refit else None,
        trimmed=trimmed,
        made_by=_made_by(options, request, subject, prune_type=prune_type, refit=refit),
        asked={
            name: getattr(options, name)
            for kind in (TargetOptions, ServeOptions, FitOptions)
            for name in kind.__dataclass_fields__
        },
    )


def _made_by(options: ChoosingOptions, request: Request, subject: Subject, *, prune_type: str, refit: bool) -> dict[str, Any]:
    """The record of how units are chosen, for the plan."""
    config, layout = subject.config, subject.layout
    used = {axis: request.metric_of[axis] for axis in sorted(request.axes(config))}
    made_by = {
        "metric": metric_named(options.metric).spelling if options.metric else used,
        "seed": options.seed,
        "prune_type": prune_type,
    }
    made_by |= {"tensor_parallel": layout.tensor, "pipeline_parallel": layout.pipeline}
    if request.probed_axes():
        made_by["allocate"] = options.allocate
    if refit and config.after_norms and "hidden" in used and options.hidden_method is None:
        made_by["hidden_method"] = f"select: {NO_ROTATION}"
        if subject.world.is_main:
            log.info("hidden channels are selected, not rotated: this is %s", NO_ROTATION)
    if options.vocab_plan:
        made_by["vocab"] = request.vocab_plan.vocab_record()
    return made_by


def _unserved(request: Request, demand: Demand, config: ModelConfig) -> list[str]:
    """What is said of runtimes that will not load what is asked for, where they load the model."""
    if request.plan is not None or request.target is not None:
        new = request.plan.new_config(config) if request.plan is not None else request.target.config
        return warnings(new, demand.family, demand.template, before=config)
    lines = []
    for name in RUNTIMES.names():
        one = dataclasses.replace(demand, runtimes=(name,), ranks=())
        lost = [shape for shape in request.shapes if one.problems(shape)]
        if lost and not one.problems(config):
            title, why = RUNTIMES.get(name).title, "; ".join(one.problems(lost[0]))
            lines.append(
                f"{title} does not do {len(lost)} of {len(request.shapes)} shapes within the budget ({why}); --serve {name} "
                "leaves them out"
            )
    return lines
