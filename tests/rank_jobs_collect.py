"""What ranks run for tests of the pass over the text: plain functions of a module that spawned processes can import."""

from __future__ import annotations

import importlib
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from rank_jobs import forget_groups, run_steps

from megatron_prune.checkpoint import megatron
from megatron_prune.files.hidden import CONTENT
from megatron_prune.importance import walk as module
from megatron_prune.importance.collect import collect as measure
from megatron_prune.importance.statistics import LayerStatistics, Statistics
from megatron_prune.runtime.world import World
from megatron_prune.text.tokens import Calibration


def collect(
    world: World,
    checkpoint: str,
    folder: str,
    samples: dict[str, Any],
    tp: int,
    pp: int,
    moments: list[str],
    *,
    batch_tokens: int = 4096,
    stop_after: list[int] | None = None,
) -> int:
    """Run ``collect`` into ``folder`` → tokens × layers that were reported.

    Args:
        stop_after: by rank: stop as Ctrl-C would once so many tokens × layers are reported.
    """
    from megatron_prune.runtime.megatron_stage import MegatronStage

    opened = megatron.open_checkpoint(Path(checkpoint))
    kinds = {"tokens": torch.int64, "lengths": torch.int64, "weights": torch.float64}
    calibration = Calibration(**{name: torch.tensor(samples[name], dtype=kind) for name, kind in kinds.items()})
    Path(folder).mkdir(parents=True, exist_ok=True)
    statistics, counted = Statistics(folder=Path(folder), config=opened.config), 0
    layout, before = replace(opened.layout, tensor=tp, pipeline=pp), module.BATCH_TOKENS

    def progress(count: int) -> None:
        nonlocal counted
        counted += count
        if stop_after is not None and counted >= stop_after[world.rank]:
            raise KeyboardInterrupt

    module.BATCH_TOKENS = batch_tokens
    stage = MegatronStage(layout, world, dtype=torch.float32, seq_length=calibration.tokens.shape[1])
    try:
        measure(opened.tensors, calibration, stage, statistics, frozenset(moments), world, progress=progress)
    finally:
        module.BATCH_TOKENS = before
        stage.close()
        forget_groups()
    return counted


def collect_refused(world: World, *args: Any) -> str:
    """The message of the ``InputError`` that this process raises."""
    from megatron_prune.errors import InputError

    try:
        collect(world, *args)
    except InputError as error:
        return str(error)
    return "nothing was raised"


def step_measuring(
    world: World, name: str, options: dict[str, Any], *, kill: tuple[str, int] | None = None
) -> tuple[str | None, list[str]]:
    """Run a step → (class of what it raised, layers that were filed on the way, such as ``layer_0002``).

    Args:
        kill: (prefix, n): stop with ``KeyboardInterrupt`` as soon as the n-th file whose place begins so is there;
            places are paths below the work directory.
    """
    from megatron_prune.checkpoint.role_store import RoleStore

    filed, file_layer, file_roles = [], LayerStatistics.save, RoleStore.save

    def note(path: Path) -> None:
        place = path.stem if path.parent.name == CONTENT else f"{path.parent.name}/{path.stem}"
        filed.append(place)
        if kill is not None and sum(entry.startswith(kill[0]) for entry in filed) == kill[1]:
            raise KeyboardInterrupt

    def save_layer(self, path):
        file_layer(self, path)
        note(path)

    def save_roles(self, layer, weights):
        file_roles(self, layer, weights)
        note(self.path(layer))

    LayerStatistics.save, RoleStore.save = save_layer, save_roles
    raised = None
    try:
        run_steps(world, (name, options))
    except BaseException as error:
        raised = type(error).__name__
        stop = importlib.import_module("megatron_prune.runtime.model").stop_parallel
        stop()
    finally:
        LayerStatistics.save, RoleStore.save = file_layer, file_roles
        forget_groups()
    return raised, filed
