"""A Hugging Face directory, written by all processes."""

from __future__ import annotations

import re
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch

from megatron_prune.arch.model import ModelConfig
from megatron_prune.arch.tensors import TensorId
from megatron_prune.checkpoint import both_versions, huggingface
from megatron_prune.checkpoint.manifest import RECIPE_FILE, Recipe, without_places
from megatron_prune.checkpoint.stream import content_id
from megatron_prune.errors import InputError
from megatron_prune.evaluation.one_layer import import_stock_class
from megatron_prune.families.family import Family, form_of
from megatron_prune.families.nemotron_nas import NEMOTRON_NAS
from megatron_prune.opening.source import Source, commonest, run
from megatron_prune.runtime.reporting import log
from megatron_prune.runtime.world import World
from megatron_prune.serving.pre_tokenizer import advice
from megatron_prune.vocabulary.id_map import MAP_FILE
from megatron_prune.vocabulary.trimmed import Trimmed
from megatron_prune.writing.check import check_huggingface
from megatron_prune.writing.output import Output, bytes_of, staged
from megatron_prune.writing.overwrite import HUGGING_FACE


def write_huggingface(
    world: World,
    output: Output,
    source: Source,
    *,
    config: ModelConfig,
    family: Family,
    hf_config: dict,
    config_text: str | None,
    dtypes: dict[TensorId, torch.dtype],
    max_shard_bytes: int,
    side_files: Path | None,
    trimmed: Trimmed | None = None,
    tied_head_stored: bool = False,
    buffers: dict[str, torch.Tensor] | None = None,
    files: dict[str, str] | None = None,
    recipe: list[dict[str, Any]] | None = None,
    base_model: str | None = None,
    identity: str | None = None,
) -> None:
    """Write a Hugging Face directory; every process takes part.

    Args:
        config_text: the exact text of ``config.json``, where the model is one that was read and is written back unchanged;
            a changed one is described so that transformers 4 and 5 read the same (``checkpoint/both_versions.py``).
        trimmed: the tokenizer that takes the place of that in ``side_files``.
        files: further text files by name (model card, plan).
        recipe: how the model came to be, kept beside it, without the folders of this machine.
        base_model: id on the hub of the model that it descends from, kept with the recipe.
        identity: the content id by which the model is known; that of what is written where ``None``.
    """

    def lay_out() -> None:
        if side_files:
            huggingface.copy_side_files(side_files, partial)
            for name in (huggingface.BUFFERS_FILE, RECIPE_FILE):  # of the weights that it lies beside
                (partial / name).unlink(missing_ok=True)
            if trimmed:
                trimmed.write(partial)
            if line := advice(partial, trimmed=(partial / MAP_FILE).is_file(), nemotron_nas=form_of(hf_config) is NEMOTRON_NAS):
                log.info("%s", line)
        described = hf_config
        if config_text is None:
            described = both_versions.describe(hf_config, config, commonest(dtypes))
            both_versions.rewrite_side_files(partial, config.vocab_size)
        huggingface.lay_out(
            partial,
            config,
            family,
            described,
            dtypes,
            max_shard_bytes=max_shard_bytes,
            tied_head_stored=tied_head_stored,
            buffers=buffers,
            config_text=config_text,
        )
        for name, text in (files or {}).items():
            (partial / name).write_text(text, encoding="utf-8")

    with staged(world, output, HUGGING_FACE, bytes_of(config, dtypes, side_files)) as partial:
        world.on_main(lay_out)
        target = huggingface.open_model(partial).tensors
        # transformers takes two seconds to import; a thread that imports it too before that is over gets half of it.
        with ThreadPoolExecutor(1) as meanwhile:
            if output.check and world.is_main:
                meanwhile.submit(import_stock_class, family.architecture)
            report = run(world, source, target, label="writing", strict=output.strict)
        if recipe is not None:
            told = Recipe(
                recipe=without_places(recipe),
                digests=report.in_order(config),
                base_model=base_model,
                content_id=identity or content_id(report.digests),
            )
            world.on_main(lambda: (partial / RECIPE_FILE).write_text(told.dumps(), encoding="utf-8"))
        if output.check:
            check_huggingface(world, partial, config, report)


def parse_size(text: str) -> int:
    """``"5GB"``, ``"500MB"`` → bytes (decimal, as transformers reads them).

    Raises:
        InputError: if it is not such a size.
    """
    match = re.fullmatch(r"([0-9]{1,18})\s*([KMGT]?)B?", text.strip().upper())
    if not match or int(match[1]) == 0:
        raise InputError("--max-shard-size", got=repr(text[:40]), needed="a size such as 5GB or 500MB")
    return int(match[1]) * 10 ** (3 * " KMGT".index(match[2] or " "))
