"""What ranks of a pool run for ``distributed/test_hf_stage.py``: megatron-core's layers over a Hugging Face directory."""

from __future__ import annotations

from pathlib import Path

import numpy
import torch
from rank_jobs import forget_groups

from megatron_prune.arch.sharding import ParallelLayout
from megatron_prune.checkpoint import huggingface
from megatron_prune.importance.collect import collect
from megatron_prune.importance.statistics import SITES, STREAM, Statistics
from megatron_prune.importance.walk import layer_reader
from megatron_prune.runtime.stage import OpenLayer, Stage
from megatron_prune.runtime.stage import added as adds
from megatron_prune.runtime.world import World
from megatron_prune.surgery.reconstruct import Examples, reconstruct
from megatron_prune.text.tokens import Calibration

EVERYTHING = frozenset({*SITES, STREAM, "final_norm"})


def values_inside(layer: OpenLayer, stream: torch.Tensor, stage: Stage) -> dict[str, torch.Tensor]:
    """What the functions of a layer's two blocks give, parts of ranks joined; each fed with what the one before gave."""
    found, names = (
        {},
        (("norm_attention", "context", "write_attention", "attention"), ("norm_mlp", "channels", "write_mlp", "mlp")),
    )
    for block, (norm, inside, write, after) in zip(layer.blocks, names):
        found[norm] = block.norm(stream)
        parts = block.inside(found[norm])
        found |= {inside: stage.gather(parts), write: block.write(parts)}
        found[after] = block.after(found[write])
        stream = stream + found[after]
    return found


def megatron_values(world: World, folder: str, number: int, stream: numpy.ndarray, tp: int, dtype: str) -> dict:
    """:func:`values_inside` a layer of a Hugging Face directory, run by megatron-core; float32 numpy."""
    from megatron_prune.runtime.megatron_stage import MegatronStage

    tensors, kind = huggingface.open_model(Path(folder)).tensors, getattr(torch, dtype)
    stage = MegatronStage(ParallelLayout(tensor=tp), world, dtype=kind, seq_length=stream.shape[1])
    try:
        layer = stage.layer(tensors.config.of_layer(number))
        layer.load(layer_reader(tensors, number))
        found = values_inside(layer, torch.from_numpy(stream).to(kind), stage)
        return {name: value.float().numpy() for name, value in found.items()}
    finally:
        stage.close()
        forget_groups()


def megatron_collect(world: World, folder: str, statistics: str, calibration: dict[str, numpy.ndarray], tp: int) -> None:
    """:func:`collect` everything of a Hugging Face directory with megatron-core."""
    from megatron_prune.runtime.megatron_stage import MegatronStage

    text = Calibration(**{name: torch.from_numpy(value) for name, value in calibration.items()})
    tensors = huggingface.open_model(Path(folder)).tensors
    stage = MegatronStage(ParallelLayout(tensor=tp), world, dtype=torch.float32, seq_length=text.tokens.shape[1])
    try:
        found = Statistics(folder=Path(statistics), config=tensors.config)
        collect(tensors, text, stage, found, EVERYTHING, world)
    finally:
        stage.close()
        forget_groups()


def megatron_reconstruct(
    world: World, folder: str, number: int, stream: numpy.ndarray, added: numpy.ndarray, roles: list[str], tp: int, passes: int
) -> dict[str, numpy.ndarray]:
    """:func:`reconstructed` with a layer that megatron-core runs; ranks beyond ``tp`` hold other samples."""
    from megatron_prune.runtime.megatron_stage import MegatronStage

    tensors = huggingface.open_model(Path(folder)).tensors
    stage = MegatronStage(ParallelLayout(tensor=tp), world, dtype=torch.float32, seq_length=stream.shape[1])
    try:
        layer = stage.layer(tensors.config.of_layer(number))
        layer.load(layer_reader(tensors, number))
        found = reconstructed(layer, stage, torch.from_numpy(stream), torch.from_numpy(added), set(roles), passes)
        return {role: value.numpy() for role, value in found.items()}
    finally:
        stage.close()
        forget_groups()


def reconstructed(
    layer: OpenLayer, stage: Stage, stream: torch.Tensor, added: torch.Tensor, roles: set[str], passes: int
) -> dict[str, torch.Tensor]:
    """The matrices of a block after it was fitted to give ``added``; token t of sample s weighs 1 + (s + t) % 3."""
    numbers = torch.arange(len(stream))[stage.copy :: stage.copies]
    weights = 1.0 + (torch.arange(len(stream))[:, None] + torch.arange(stream.shape[1])) % 3
    mine = [part[numbers].to(stage.device) for part in (stream, added, weights)]
    examples = Examples(
        numbers=numbers, count=len(stream), length=stream.shape[1], at=lambda batch: tuple(part[batch] for part in mine)
    )
    block = next(block for block in layer.blocks if block.kind.writer in roles)
    parameters = [(parameter, 0.1) for parameter in layer.matrices(roles).values()]
    assert reconstruct(parameters, lambda x: adds(block, x), examples, stage, passes)
    return layer.full(roles)
