"""Train a pruned Megatron checkpoint, from where it stands, at the TP × PP × DP it has or any other."""

from __future__ import annotations

from megatron_prune.opening.opened import open_megatron
from megatron_prune.recovery.options import filled_options
from megatron_prune.runtime.layout import run_layout
from megatron_prune.runtime.world import World
from megatron_prune.verbs.recover import RecoverOptions


def recover(options: RecoverOptions, world: World) -> int:
    """Run the step; every process takes part.

    Returns:
        0, or 143 if it was asked to stop (SIGTERM, SIGINT) and has saved.

    Raises:
        InputError: on arguments, data, a checkpoint or a layout that do not fit; nothing is written.
        TrainingError: on a loss that is not finite, or a checkpoint that cannot be written; those before stay.
    """
    model = open_megatron(options.load, world, options, flags=options.megatron)
    options = filled_options(options, model.config)
    layout = run_layout(model.layout, world, options.tensor_model_parallel_size, options.pipeline_model_parallel_size)

    from megatron_prune.recovery.check import check
    from megatron_prune.recovery.launch import train

    teacher = check(options, model, layout, world)
    return train(options, model, teacher, layout, world)
