"""Whether what was written is what was to be written."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Callable, TypeVar

from megatron_prune.arch.model import ModelConfig
from megatron_prune.arch.tensors import tensor_ids
from megatron_prune.checkpoint import huggingface, megatron
from megatron_prune.checkpoint.stream import StreamReport, check_ends
from megatron_prune.checkpoint.tensor_map import TensorMap
from megatron_prune.errors import InputError, PruneError
from megatron_prune.evaluation.one_layer import check_in_transformers
from megatron_prune.runtime.world import World

log = logging.getLogger("megatron_prune")
T = TypeVar("T")

FAILED = "the check of what was written failed (--no-check leaves it out); nothing is put in place"


def check_megatron(world: World, partial: Path, config: ModelConfig) -> None:
    """Reopen a Megatron checkpoint that was just written, compare it with its manifest and say so; every process takes part.

    Raises:
        PruneError: if it is not what was to be written.
    """
    written = _reopened(lambda: megatron.open_checkpoint(partial))
    problems = [*_read_again(world, written.tensors), *(f"{name}: other bytes" for name in written.edited_files())]
    if written.config != config:
        problems.append(f"its config is {written.config}, not {config}")
    _say_checked(world, problems, config, "its files and args fit")


def check_huggingface(world: World, partial: Path, config: ModelConfig, written: StreamReport) -> None:
    """Reopen a Hugging Face directory that was just written, compare it with what was written, run a layer of it in stock
    transformers and say so; every process takes part.

    Raises:
        PruneError: if it is not what was to be written, or transformers reads it otherwise.
    """
    model = _reopened(lambda: huggingface.open_model(partial))
    model.tensors.expect(written.stored, partial)
    problems = _read_again(world, model.tensors)
    if model.config != config:
        problems.append(f"its config.json means {model.config}, not {config}")
    name = ""
    if world.is_main and not problems:
        name, found = check_in_transformers(model)
        problems += found if not written.troubled else []
    _say_checked(world, problems, config, f"{name} takes them and a layer of it computes")


def _reopened(action: Callable[[], T]) -> T:
    try:
        return action()
    except InputError as error:
        raise PruneError(f"{FAILED}\n  {error}") from None


def _read_again(world: World, tensors: TensorMap) -> list[str]:
    """What is wrong with tensors whose digests are known, over all processes."""
    return [problem for part in world.all_gather(check_ends(tensors, world.rank, world.size)) for problem in part]


def _say_checked(world: World, problems: list[str], config: ModelConfig, text: str) -> None:
    error = None
    if problems:
        error = PruneError("\n  ".join([FAILED, *problems[:20]]))
    world.agree(error)
    if world.is_main:
        log.info("checked: %d tensors lie as they were written, %s", len(tensor_ids(config)), text)
