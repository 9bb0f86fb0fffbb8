"""The same cuts and fits on a Hugging Face directory, in a single process without Megatron (S4's ``prune_hf/prune_llama.py``).

With the same plan, and nothing re-fitted, the result equals the export of the tensor-parallel route bit for bit; re-fitted
on the same text it equals it up to rounding.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_prune.checkpoint import model_folder
from megatron_prune.checkpoint.tied_copy import check_tied_copy
from megatron_prune.config import flag
from megatron_prune.errors import InputError
from megatron_prune.families.choice import choose_family
from megatron_prune.files import staging
from megatron_prune.files.documents import STRICT, read_json
from megatron_prune.opening.opened import open_huggingface
from megatron_prune.opening.side_files import say_links
from megatron_prune.pruning.asked import SHAPE, check_asked
from megatron_prune.pruning.engines.huggingface import HuggingFaceEngine
from megatron_prune.pruning.measure import Subject
from megatron_prune.pruning.options import TargetOptions
from megatron_prune.pruning.procedure import prune_model
from megatron_prune.runtime.world import World
from megatron_prune.verbs.prune_hf import PruneHfOptions
from megatron_prune.writing.cut import Form
from megatron_prune.writing.huggingface import parse_size
from megatron_prune.writing.overwrite import HUGGING_FACE, check_output
from megatron_prune.writing.push import check_push


def prune_hf(options: PruneHfOptions, world: World) -> None:
    """Run the step.

    Raises:
        InputError: on a request, plan or model that does not fit; nothing is written.
    """
    save = Path(options.save)
    folder = model_folder.resolve(options.load)
    check_output(save, HUGGING_FACE, overwrite=options.overwrite, source=folder, inputs=(options.scores, options.tokenizer))
    say_links(folder, world)
    if options.save_plan:
        staging.check_file(Path(options.save_plan), beside=save)
    max_shard_bytes = parse_size(options.max_shard_size)
    options = with_sizes(options)
    model = open_huggingface(folder, world)
    model.named_tokenizer = options.tokenizer
    check_tied_copy(model.checkpoint)
    family = choose_family(model.family, options.target_family, model.config)
    subject = Subject(model=model, engine=HuggingFaceEngine(model), tokenizer=model.tokenizer)
    push = check_push(options, world)
    form = Form(max_shard_bytes=max_shard_bytes, hub_id=push and push.id)
    prune_model(options, subject, family, form, save, prune_type="balance")
    if push:
        push.send(save, world)


def with_sizes(options: PruneHfOptions) -> PruneHfOptions:
    """The options with the sizes of the JSON file, where nothing else says the shape.

    Raises:
        InputError: if the file is not one of sizes, or is named beside something that says the shape too.
    """
    said = [flag(name) for name in SHAPE if getattr(options, name) is not None]
    if not said and not options.prune_config_path and not Path(DEFAULT_CONFIG).exists():
        check_asked(options)
    elif not said and not options.untie:
        return dataclasses.replace(options, **read_prune_config(Path(options.prune_config_path or DEFAULT_CONFIG)))
    if options.prune_config_path:
        raise InputError(f"{', '.join(said)} and --prune-config-path both say the shape", do="give one of the two")
    return options


@dataclass(frozen=True, kw_only=True)
class PruneConfig:
    """The sizes of S4's JSON file: see :class:`TargetOptions`."""

    __pydantic_config__ = STRICT

    hidden_size_remain: int | None = None
    ffn_hidden_size_remain: int | None = None
    num_attention_heads_remain: int | None = None
    num_query_groups_remain: int | None = None
    num_layers_remain: int | None = None
    drop_layers: list[int] | None = None


DEFAULT_CONFIG = "prune_config.json"


def read_prune_config(path: Path) -> dict[str, Any]:
    """The sizes in a JSON file under S4's keys.

    Raises:
        InputError: if it is not such a file, or has a key or a value that is none of these.
    """
    do = f"name a JSON file of {', '.join(TargetOptions.SIZES)}; or give sizes, a budget or a plan"
    held = read_json(path, PruneConfig, error=InputError, do=do)
    return {**vars(held), "drop_layers": None if held.drop_layers is None else tuple(held.drop_layers)}
