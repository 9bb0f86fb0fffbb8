"""Which parallel layout a run uses: the one asked for, else the checkpoint's, and it must fit the processes."""

from __future__ import annotations

from dataclasses import replace

from megatron_prune.arch.sharding import ParallelLayout
from megatron_prune.errors import InputError
from megatron_prune.runtime.world import World


def run_layout(stored: ParallelLayout, world: World, tensor: int | None, pipeline: int | None) -> ParallelLayout:
    """The layout of this run.

    Args:
        stored: that of the checkpoint.
        tensor, pipeline: what was asked for, ``None`` for the checkpoint's.

    Raises:
        InputError: if the number of processes is no multiple of TP × PP.
    """
    layout = replace(stored, tensor=stored.tensor if tensor is None else tensor)
    layout = replace(layout, pipeline=stored.pipeline if pipeline is None else pipeline)
    ranks = layout.tensor * layout.pipeline
    if world.size % ranks:
        raise InputError(
            f"{world.size} process{'es' if world.size > 1 else ''} for TP {layout.tensor} × PP {layout.pipeline}",
            needed=f"a multiple of {ranks} processes",
            do=f"start with torchrun --nproc-per-node {ranks}, or set --tensor-model-parallel-size and "
            "--pipeline-model-parallel-size (any checkpoint is read at any layout that divides the model)",
        )
    return layout
