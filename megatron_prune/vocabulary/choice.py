"""Request → the tokens that stay, and the report; or those of a plan."""

from __future__ import annotations

import dataclasses
import io
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy
import torch
from rich.table import Table
from rich.text import Text

from megatron_prune.arch.model import ModelConfig
from megatron_prune.arch.tensors import EMBEDDING, parameter_count
from megatron_prune.errors import InputError, PlanError
from megatron_prune.opening.opened import Opened
from megatron_prune.planning.check import kept_tokens
from megatron_prune.planning.plan import Plan, load_plan, whole_plan
from megatron_prune.runtime.reporting import print_table
from megatron_prune.vocabulary import report as reports
from megatron_prune.vocabulary.request import SelectOptions, held_out_lines, read_counts, served_tokens, wanted_tokens
from megatron_prune.vocabulary.selection import Selection, Wanted, select
from megatron_prune.vocabulary.trimmed import Trimmed
from megatron_prune.vocabulary.vocabulary import Vocabulary


@dataclass(frozen=True, kw_only=True, eq=False)
class Chosen:
    """Attributes:
    trimmed: the tokens that stay.
    report: what that keeps, costs and changes.
    made_by: how they were chosen, for plan and recipe.
    """

    trimmed: Trimmed
    report: dict[str, Any]
    made_by: dict[str, Any]


def choose(options: SelectOptions, model: Opened, vocabulary: Vocabulary, plan_path: str | None = None) -> Chosen:
    """Choose tokens, or take those of a plan, and report.

    Raises:
        InputError: if that cannot be done.
    """
    served = served_tokens(options, model)
    texts = held_out_lines(options)
    counts = read_counts(options.counts, vocabulary)
    total = None if counts is None else _of_rows(counts.total(), vocabulary.rows)
    selection: Selection | None = None
    if plan_path:
        trimmed, made_by = _of_plan(plan_path, model, vocabulary)
        Wanted(**served).check_served(len(trimmed.rows), len(vocabulary.pinned), vocabulary.rows)
    else:
        selection = select(vocabulary, total, wanted_tokens(options, vocabulary, model.layout, served))
        trimmed = Trimmed(vocabulary=vocabulary, rows=selection.rows)
        asked = {name: getattr(options, name) for name in (*SelectOptions.CRITERIA, "multiple_of", "serve")}
        made_by = {name: value for name, value in asked.items() if value is not None}
        made_by |= {"prior": options.prior} if counts else {}
        made_by |= {"corpora": [dataclasses.asdict(corpus) for corpus in counts.corpora]} if counts else {}
        made_by |= {"tokenizer": vocabulary.digest}
    report = reports.describe(trimmed, selection, total, texts)
    return Chosen(trimmed=trimmed, report=report | _savings(trimmed, model), made_by=made_by)


def _of_rows(total: numpy.ndarray, rows: int) -> numpy.ndarray:
    """Counts for as many rows: what is more has no tokens."""
    return numpy.pad(total[:rows], (0, max(0, rows - len(total))))


def _of_plan(path: str, model: Opened, vocabulary: Vocabulary) -> tuple[Trimmed, dict[str, Any]]:
    if model.config is None:
        raise InputError(f"--plan {path}", got=f"a tokenizer alone, {model.path}", needed="a model")
    plan = load_plan(Path(path))
    kept_tokens(plan, model.config, path)
    return trimmed_by(plan, vocabulary, path), plan.vocab_record()


def trimmed_by(plan: Plan, vocabulary: Vocabulary, where: object) -> Trimmed:
    """The vocabulary that a plan leaves.

    Raises:
        PlanError: if it was made for another tokenizer, or drops what must stay.
    """
    if plan.tokenizer not in (None, vocabulary.digest):
        raise PlanError(
            f"{where} was made for another tokenizer than the one in {vocabulary.folder}",
            got=plan.tokenizer,
            needed=vocabulary.digest,
            do="choose again with megatron-prune vocab select",
        )
    trimmed = Trimmed(vocabulary=vocabulary, rows=numpy.array(plan.vocab, dtype=numpy.int64))
    trimmed.check(where)
    return trimmed


def _savings(trimmed: Trimmed, model: Opened) -> dict[str, Any]:
    if model.config is None:
        return {}
    new = dataclasses.replace(model.config, vocab_size=len(trimmed.rows))
    before, after = parameter_count(model.config), parameter_count(new)
    size = model.tensors.dtype(EMBEDDING).itemsize
    found = {"parameters": {"before": before, "after": after, "bytes_saved": (before - after) * size}}
    return found | ({"padded": model.layout.padded_vocab(new.vocab_size)} if model.layout else {})


def show(chosen: Chosen) -> None:
    """Print the report."""
    table = Table(show_header=False, box=None, pad_edge=False)
    for what, value in reports.lines(chosen.report):
        table.add_row(what, Text(value))  # not markup: tokens may hold brackets
    print_table(table)


def files_of(chosen: Chosen, options: SelectOptions) -> dict[Path, bytes]:
    """The report and the ids, where these were asked for."""
    files = {}
    if options.report:
        body = {"format": "megatron-prune vocabulary report", "made_by": chosen.made_by, **chosen.report}
        files[Path(options.report)] = json.dumps(body, indent=2, ensure_ascii=False).encode() + b"\n"
    if options.save_ids:
        held = io.BytesIO()
        torch.save(torch.from_numpy(chosen.trimmed.rows), held)
        files[Path(options.save_ids)] = held.getvalue()
    return files


def plan_of(chosen: Chosen, config: ModelConfig) -> Plan:
    """The plan that cuts the vocabulary alone; it fits any model with this tokenizer."""
    whole, rows = whole_plan(config, {"vocab": chosen.made_by}, None), chosen.trimmed.rows.tolist()
    new = {**whole.new, "vocab_size": len(rows)}
    return dataclasses.replace(whole, new=new, vocab=rows, tokenizer=chosen.trimmed.vocabulary.digest)
