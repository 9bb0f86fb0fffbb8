"""What ranks of a pool run to sample: see ``rank_jobs.py``."""

from __future__ import annotations

from typing import Any

import numpy
import torch
from rank_jobs import running

from megatron_prune.arch.sharding import ParallelLayout
from megatron_prune.runtime import cpu
from megatron_prune.runtime.world import World


def sampled(world: World, checkpoint: str, tp: int, pp: int, options: dict[str, Any]) -> tuple[numpy.ndarray, list[int]]:
    """What ``sample`` gives, and what it reported."""
    from megatron_prune.runtime.sampling import sample

    reports: list[int] = []
    with running(world, checkpoint, ParallelLayout(tensor=tp, pipeline=pp), options["length"]) as model:
        return sample(model, progress=reports.append, **options).numpy(), reports


def cached_logits(world: World, checkpoint: str, tokens: list[list[int]], pieces: list[int], tp: int, pp: int):
    """Logits [batch, pieces, vocabulary] after each piece of the text, run with a cache; ``None`` but on the last stage."""
    from megatron_prune.runtime.sampling import CachedForward

    text = torch.tensor(tokens)
    layout = ParallelLayout(tensor=tp, pipeline=pp)
    with running(world, checkpoint, layout, text.shape[1]) as model, cpu.stand_in(), torch.no_grad():
        forward = CachedForward(model, *text.shape)
        found = [forward(piece) for piece in text[:, : sum(pieces)].split(pieces, dim=1)]
    return None if found[0] is None else torch.stack(found, dim=1).numpy()


def sampled_from_nan(world: World, checkpoint: str, tp: int, pp: int, options: dict[str, Any]) -> None:
    """Sample from a model whose last norm is not a number."""
    from megatron_prune.runtime.sampling import sample

    with running(world, checkpoint, ParallelLayout(tensor=tp, pipeline=pp), options["length"]) as model:
        for name, parameter in model.module.named_parameters():
            if "final_layernorm" in name:
                parameter.data.fill_(float("nan"))
        sample(model, **options)
