"""The tokens that stay in a pruned model: its tokenizer, and the head's rows that take over what dropped ones said."""

from __future__ import annotations

from dataclasses import replace

import torch

from megatron_prune.arch.tensors import TensorId, head_of
from megatron_prune.files.region import Scratch
from megatron_prune.opening.opened import Opened
from megatron_prune.opening.source import PARAM_DTYPES, Source
from megatron_prune.planning.plan import Plan
from megatron_prune.pruning.measure import Subject
from megatron_prune.pruning.options import CalibrationOptions, TargetOptions
from megatron_prune.pruning.request import Request
from megatron_prune.runtime.reporting import progress_bar
from megatron_prune.surgery.cut import Cut
from megatron_prune.surgery.fold_tokens import FoldedRows, changing_rows, fold_rows, hidden_states, respelled
from megatron_prune.text.tokens import Calibration
from megatron_prune.vocabulary.choice import trimmed_by
from megatron_prune.vocabulary.folder import tokenizer_folder
from megatron_prune.vocabulary.id_map import IdMap
from megatron_prune.vocabulary.trimmed import Trimmed
from megatron_prune.vocabulary.vocabulary import holds_tokenizer, open_vocabulary


def kept_vocabulary(options: TargetOptions, request: Request, model: Opened) -> Trimmed | None:
    """The tokenizer that goes with the tokens that stay; ``None`` where all do.

    Raises:
        InputError: if there is no tokenizer, it is not the model's, or it needs a token that goes.
    """
    if request.vocab_plan is None:
        return None
    own = model.folder  # what was named may be of the text alone
    folder = own if own and holds_tokenizer(own) else tokenizer_folder(own, model.named_tokenizer)
    vocabulary = open_vocabulary(folder, model.config.vocab_size)
    return trimmed_by(request.vocab_plan, vocabulary, options.vocab_plan or options.plan)


def folded(
    plan: Plan, ids: IdMap, subject: Subject, calibration: Calibration, options: CalibrationOptions
) -> tuple[Plan, Source]:
    """A plan that cuts the vocabulary alone, and the tensors it leaves, the head's rows fitted on text to take over what dropped
    tokens said; every process takes part.

    Args:
        ids: what renumbers the text.
    """
    calibration = respelled(calibration, ids)
    rows = _fitted_rows(ids, subject, calibration, PARAM_DTYPES[options.dtype])
    facts = {"rows": len(rows.tokens), "calibration": calibration.provenance}
    plan = replace(plan, made_by={**plan.made_by, "vocab": {**plan.vocab_record(), "fold": facts}})
    cut = Cut(plan, subject.config)
    head = head_of(subject.config)  # tied: at both ends, so that it stays tied

    def transform(tensor: TensorId, data: torch.Tensor, scratch: Scratch) -> torch.Tensor:
        return cut.transform(tensor, rows.put_into(data) if tensor == head else data, scratch)

    return plan, Source(tensors=subject.tensors, origin=cut.origin, transform=transform)


def _fitted_rows(ids: IdMap, subject: Subject, calibration: Calibration, dtype: torch.dtype) -> FoldedRows:
    world, shown = subject.world, subject.world.is_main
    stage = subject.engine.stage(subject.config, dtype=dtype, seq_length=calibration.tokens.shape[1])
    total = subject.config.num_layers * calibration.tokens[stage.copy :: stage.copies].numel()
    with progress_bar("measuring", total, shown=shown, unit="tokens × layers") as advance:
        hidden = hidden_states(subject.tensors, calibration, stage, world, dtype, advance)
    with progress_bar("folding", changing_rows(ids), shown=shown, unit="rows") as advance:
        rows = fold_rows(subject.tensors, ids, hidden, stage, world, advance)
    stage.close()
    return rows
