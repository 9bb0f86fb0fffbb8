"""The legacy ``torch`` layout: one ``mp_rank_TT[_PPP]/model_optim_rng.pt`` per tensor- and pipeline-parallel rank.

Each file holds the rank's own ``state_dict`` (layers counted from 0 in each stage) beside ``args``. Ranks may hold
different numbers of units: what a rank has is read off its tensors' shapes.
"""

from __future__ import annotations

import re
from argparse import Namespace
from pathlib import Path
from typing import Any, Iterator

import torch

from megatron_prune.arch.model import ModelConfig
from megatron_prune.arch.sharding import (
    EMBEDDING,
    OUTPUT,
    MegatronTensor,
    ParallelLayout,
    Shard,
    blocks,
    layer_tensors,
    outer_tensors,
    shard,
    shard_sizes,
)
from megatron_prune.arch.tensors import TensorId
from megatron_prune.checkpoint import extra_states, torch_archive
from megatron_prune.checkpoint.tensor_map import TensorMap
from megatron_prune.errors import CheckpointError, raise_all

FILE = "model_optim_rng.pt"
_FOLDER = re.compile(r"mp_rank_(\d{2})(?:_(\d{3}))?")


def rank_folder(rank: int, stage: int, layout: ParallelLayout) -> str:
    """Folder of one rank, as Megatron-LM names it (the stage only where there are several)."""
    return f"mp_rank_{rank:02d}" + (f"_{stage:03d}" if layout.pipeline > 1 else "")


def is_legacy(path: Path) -> bool:
    """Whether ``path`` holds rank folders."""
    return path.is_dir() and any(_FOLDER.fullmatch(entry.name) for entry in path.iterdir())


def read_args(path: Path) -> Namespace:
    """The ``args`` of the first rank.

    Raises:
        CheckpointError: if the file is missing, damaged or holds none.
    """
    first = sorted(entry for entry in path.iterdir() if _FOLDER.fullmatch(entry.name))[0]
    return _load(first / FILE)["args"]


def _load(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise CheckpointError(f"{path} is missing: the checkpoint is not whole")
    content = torch_archive.read_objects(path)
    if not isinstance(content, dict) or not isinstance(content.get("args"), Namespace):
        raise CheckpointError(f"{path} holds no args", needed="a checkpoint of Megatron-LM")
    if not isinstance(content.get("model"), dict) or "language_model" in content["model"]:
        raise CheckpointError(
            f"{path} holds no model of megatron-core",
            got=f"entries {sorted(map(str, content))}",
            needed="a 'model' of megatron-core, without virtual pipeline stages",
        )
    return content


def _stage_tensors(
    config: ModelConfig, layout: ParallelLayout, stage: int
) -> Iterator[tuple[str, str, int | None, MegatronTensor]]:
    """(name in the stage, the same with local layers' names, global layer, tensor) of everything a stage holds."""
    last = layout.pipeline - 1
    for tensor in outer_tensors(config):
        if stage == (0 if tensor is EMBEDDING else last):
            yield tensor.name, tensor.name, None, tensor
    if config.tie_embeddings and last > 0 and stage == last:
        yield OUTPUT.name, OUTPUT.name, None, EMBEDDING  # the last stage's own copy of the tied embedding
    for local, layer in enumerate(layout.stage_layers(stage, config.num_layers)):
        for tensor in layer_tensors(config):
            prefix = f"decoder.layers.{local}."
            yield prefix + tensor.name, prefix + tensor.local_name, layer, tensor


def open_map(path: Path, config: ModelConfig, layout: ParallelLayout) -> TensorMap:
    """Where every role tensor lies.

    Raises:
        CheckpointError: if a rank's file is missing or damaged, or a tensor is missing, extra or of another shape.
    """
    found, problems = TensorMap(config), []
    for stage in range(layout.pipeline):
        files = [path / rank_folder(rank, stage, layout) / FILE for rank in range(layout.tensor)]
        models = [_load(file)["model"] for file in files]
        expected = set()
        for name, local_name, layer, tensor in _stage_tensors(config, layout, stage):
            names = [next((n for n in (name, local_name) if n in model), None) for model in models]
            expected |= {name, local_name}
            absent = [f"{file}: {name}: missing" for file, there in zip(files, names) if there is None]
            problems += absent
            if absent:
                continue
            parts = [model[there] for model, there in zip(models, names)]
            copy = name == OUTPUT.name and tensor is EMBEDDING
            problems += _add(found, tensor, layer, config, layout, list(zip(files, parts)), copy)
        for file, model in zip(files, models):
            extra = [key for key in model if key not in expected and not key.endswith("_extra_state")]
            problems += [f"{file}: {key}: not a tensor of this model" for key in extra]
    extra_folders = {entry.name for entry in path.iterdir() if _FOLDER.fullmatch(entry.name)}
    extra_folders -= {rank_folder(r, s, layout) for r in range(layout.tensor) for s in range(layout.pipeline)}
    problems += [f"{folder}: more ranks than TP {layout.tensor} × PP {layout.pipeline}" for folder in sorted(extra_folders)]
    raise_all(CheckpointError, f"{path} does not hold the model that its args describe", problems)
    return found.validate(path)


def _add(
    found: TensorMap,
    tensor: MegatronTensor,
    layer: int | None,
    config: ModelConfig,
    layout: ParallelLayout,
    parts: list[tuple[Path, torch.Tensor]],
    copy: bool,
) -> list[str]:
    """File one tensor's shards; say what is wrong with their shapes."""
    full = tensor.full_shape(config, layout)
    for file, part in parts:
        if not isinstance(part, torch.Tensor) or part.dim() != len(full):
            return [f"{file}: {tensor.name} of layer {layer}: not a tensor of {len(full)} dimensions"]
    dim = 1 if tensor.split == "cols" else 0
    held = [part.shape[dim] // (2 if tensor.split == "gated" else 1) for _, part in parts]
    problems = []
    for rank, (file, part) in enumerate(parts):
        mine = shard(tensor, full, layout.tensor, rank, held if tensor.split != "none" else None)
        shape = mine.shape if len(full) > 1 else mine.shape[:1]
        total = sum(held) * (2 if tensor.split == "gated" else 1)
        if tuple(part.shape) != shape or (tensor.split != "none" and total != full[dim]):
            problems.append(f"{file}: {tensor.name} of layer {layer}: shape {tuple(part.shape)} does not add up to {full}")
        elif part.numel():
            region = torch_archive.region_of(part, file)
            found.add(layer, region, blocks(tensor, config, full[0], mine), replica=copy or (tensor.split == "none" and rank > 0))
    return problems


def lay_out(
    path: Path,
    config: ModelConfig,
    layout: ParallelLayout,
    dtypes: dict[TensorId, torch.dtype],
    args: Namespace,
    sizes: dict[tuple[str, int], list[int]],
) -> None:
    """Create every rank's file with all tensors zero; the bytes are filled in through :func:`open_map`.

    Args:
        path: an existing empty directory.
        dtypes: element type of every role tensor.
        args: what every file is to hold; their ``transformer_impl`` says whose names tensors get.
        sizes: (axis, layer) → units of every rank, where shards are of unequal size.
    """
    local_names = args.transformer_impl == "local"
    for stage in range(layout.pipeline):
        for rank in range(layout.tensor):
            model: dict[str, Any] = {}
            for name, local_name, layer, tensor in _stage_tensors(config, layout, stage):
                full = tensor.full_shape(config, layout)
                held: Shard = shard(tensor, full, layout.tensor, rank, shard_sizes(tensor, layer, config, sizes))
                shape = held.shape if len(full) > 1 else held.shape[:1]
                dtype = dtypes[TensorId(tensor.roles[0], layer)]
                model[local_name if local_names else name] = torch_archive.empty_tensor(shape, dtype)
            model |= dict.fromkeys(_extra_states(config, layout, stage, local_names))
            folder = path / rank_folder(rank, stage, layout)
            folder.mkdir(parents=True)
            with open(folder / FILE, "wb") as file:
                content = {"args": args, "checkpoint_version": 3.0, "iteration": 0, "model": model}
                torch_archive.lay_out(content, file)


def _extra_states(config: ModelConfig, layout: ParallelLayout, stage: int, local_names: bool) -> Iterator[str]:
    names = extra_states.LOCAL if local_names else extra_states.transformer_engine(config)
    for local in range(len(layout.stage_layers(stage, config.num_layers))):
        yield from (f"decoder.layers.{local}.{name}" for name in names)
    if stage == layout.pipeline - 1 and not local_names:
        yield extra_states.FINAL_NORM
