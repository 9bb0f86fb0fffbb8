"""The before/after table: shape, parameters, bytes, perplexity, and a sample generation of both models."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field
from rich.table import Table
from rich.text import Text
from typing_extensions import NotRequired, TypedDict

from megatron_prune.checkpoint import model_folder
from megatron_prune.checkpoint.description import Told
from megatron_prune.config import check_limits
from megatron_prune.errors import InputError, reason
from megatron_prune.files import staging
from megatron_prune.files.documents import read_json
from megatron_prune.opening.facts import describe
from megatron_prune.opening.opened import open_either
from megatron_prune.planning.plan import shown_size
from megatron_prune.runtime.reporting import print_table
from megatron_prune.runtime.stock_model import load_stock_model
from megatron_prune.runtime.world import World
from megatron_prune.text.encoder import load_tokenizer
from megatron_prune.text.template import ChatTemplate
from megatron_prune.verbs.compare import CompareOptions


def compare(options: CompareOptions, world: World) -> None:
    """Run the step.

    Raises:
        InputError: if a model or an evaluation cannot be read, or the evaluations are of different texts.
    """
    check_limits(options)
    if options.output:
        staging.check_file(Path(options.output))
    evaluations = [_read(options.before_evaluation), _read(options.after_evaluation)]
    protocols = [
        {key: e[key] for key in ("text", "windows", "seq_length", "begins_with_bos") if key in e} for e in evaluations if e
    ]
    if len(protocols) == 2 and {"begins_with_bos": False, **protocols[0]} != {"begins_with_bos": False, **protocols[1]}:
        raise InputError("the two evaluations are not of the same text", got=protocols[0], needed=protocols[1])
    rows = [_facts(name, options, e, world) for name, e in zip((options.before, options.after), evaluations)]
    if not world.is_main:
        return
    table = Table("", "before", "after", "after / before")
    for key in dict.fromkeys(key for row in rows for key in row if key != "sample"):
        before, after = (row.get(key, "") for row in rows)
        numbers = all(isinstance(value, (int, float)) for value in (before, after))
        table.add_row(key, Text(_show(before)), Text(_show(after)), f"{after / before:.3f}" if numbers and before else "")
    print_table(table)
    print(f"asked: {options.prompt}")
    for label, row in zip(("before", "after"), rows):
        print(f"{label}: {' '.join(row['sample'].split())}")
    if protocols:
        print("perplexity on the first {windows} windows of {seq_length} tokens of {text}".format(**protocols[0]))
    if options.output:
        content = {"before": rows[0], "after": rows[1], "protocol": protocols[0] if protocols else None}
        staging.write_files({Path(options.output): json.dumps(content, indent=2).encode() + b"\n"})


class _Evaluation(TypedDict):
    """What is read of a file of ``evaluate --output``."""

    __pydantic_config__ = {"extra": "ignore"}
    perplexity: Annotated[float, Field(gt=0, allow_inf_nan=False)]
    text: str
    windows: Annotated[int, Field(gt=0)]
    seq_length: Annotated[int, Field(gt=0)]
    begins_with_bos: NotRequired[bool]


def _read(path: str | None) -> _Evaluation | None:
    return (
        None
        if path is None
        else read_json(Path(path), _Evaluation, error=InputError, do="name a file of megatron-prune evaluate --output")
    )


def _facts(name: str, options: CompareOptions, evaluation: dict[str, Any] | None, world: World) -> dict[str, Any]:
    facts = describe(open_either(name, world, Told()))
    row = {**facts["shape"], **facts.get("layers", {}), "parameters": facts["parameters"], "weight bytes": facts["weight_bytes"]}
    if evaluation:
        row["perplexity"] = evaluation["perplexity"]
    row["sample"] = _generate(model_folder.resolve(name), options)
    return row


def _generate(folder: Path, options: CompareOptions) -> str:
    """A greedy sample by stock transformers: the answer to the prompt as a user's turn where the tokenizer has a chat template, else
    the prompt and its continuation."""
    tokenizer = load_tokenizer(folder)
    model = load_stock_model(folder)
    turn = ChatTemplate(tokenizer, folder.name, answers=False).turn(options.prompt)
    if turn is None:
        inputs, shown = tokenizer(options.prompt, return_tensors="pt"), 0
    else:  # a template says itself which special tokens there are
        inputs = tokenizer(turn, return_tensors="pt", add_special_tokens=False)
        shown = inputs["input_ids"].shape[1]
    settings = {"max_new_tokens": options.max_new_tokens, "do_sample": False, "pad_token_id": tokenizer.eos_token_id}
    try:
        output = model.generate(**inputs, **settings)
    except Exception as error:  # settings and token ids that the files name fail in any part of transformers
        raise InputError(f"transformers cannot generate with {folder}", got=reason(error)) from None
    return tokenizer.decode(output[0][shown:], skip_special_tokens=True)


def _show(value: Any) -> str:
    if isinstance(value, list):
        return shown_size(value)
    if isinstance(value, int):
        return f"{value:,}"
    return f"{value:,.2f}" if isinstance(value, float) else str(value)
