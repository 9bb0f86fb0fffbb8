"""The engine that runs a model: of a Megatron checkpoint megatron-core, of a Hugging Face directory transformers."""

from __future__ import annotations

from megatron_prune.errors import InputError
from megatron_prune.opening.opened import Opened
from megatron_prune.pruning.engines.engine import Engine
from megatron_prune.pruning.engines.huggingface import HuggingFaceEngine
from megatron_prune.pruning.engines.megatron import MegatronEngine
from megatron_prune.runtime.layout import run_layout


def engine_of(model: Opened, tensor: int | None, pipeline: int | None) -> Engine:
    """The engine of a model.

    Args:
        tensor, pipeline: the layout that was asked for; ``None`` for that of a checkpoint.

    Raises:
        InputError: if the processes are not those of the layout, or several for a Hugging Face directory.
    """
    if model.layout is not None:
        layout = run_layout(model.layout, model.world, tensor, pipeline)
        layout.check(model.config)
        return MegatronEngine(layout, model.world)
    if model.world.size > 1 or (tensor, pipeline) != (None, None):
        got = f"{model.world.size} processes" if model.world.size > 1 else "a tensor or pipeline size"
        do = "start it without torchrun, or convert it to a Megatron checkpoint (megatron-prune convert)"
        raise InputError(f"{model.path} is a Hugging Face directory, which one process measures", got=got, do=do)
    return HuggingFaceEngine(model)
