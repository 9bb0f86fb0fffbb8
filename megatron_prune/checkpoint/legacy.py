"""The legacy ``torch`` layout: one ``mp_rank_TT[_PPP]/model_optim_rng.pt`` per tensor- and pipeline-parallel rank.

Each file holds the rank's own ``state_dict`` (layers counted from 0 in each stage) beside ``args``; in a virtual pipeline
several, ``model0``, ``model1`` …, of which the second of the first stage follows on the first of the last. Ranks may hold
different numbers of units, and stages of layers: what they have is read off their tensors.
"""

from __future__ import annotations

import re
from argparse import Namespace
from pathlib import Path
from typing import Any, Iterator

import torch

from megatron_prune.arch.model import ModelConfig
from megatron_prune.arch.sharding import (
    OUTPUT_LAYER,
    WORD_EMBEDDINGS,
    MegatronTensor,
    ParallelLayout,
    Shard,
    layer_tensors,
    outer_tensors,
    patches,
    shard,
    shard_sizes,
)
from megatron_prune.arch.tensors import TensorId
from megatron_prune.checkpoint import extra_states, torch_archive
from megatron_prune.checkpoint.stored_args import args_of, unwrapped
from megatron_prune.checkpoint.tensor_map import TensorMap
from megatron_prune.errors import CheckpointError, raise_all
from megatron_prune.files.documents import shorten

FILE = "model_optim_rng.pt"
_FOLDER = re.compile(r"mp_rank_(\d{2})(?:_(\d{3}))?")
_LAYER = re.compile(r"decoder\.layers\.(\d{1,6})\.")


def rank_folder(rank: int, stage: int, layout: ParallelLayout) -> str:
    """Folder of one rank, as Megatron-LM names it (the stage only where there are several)."""
    return f"mp_rank_{rank:02d}" + (f"_{stage:03d}" if layout.pipeline > 1 else "")


def is_legacy(path: Path) -> bool:
    """Whether ``path`` holds rank folders."""
    return path.is_dir() and bool(_folders(path))


def _folders(path: Path) -> dict[tuple[int, int], Path]:
    """(tensor-parallel rank, pipeline stage) → its folder."""
    found = ((_FOLDER.fullmatch(entry.name), entry) for entry in sorted(path.iterdir()))
    return {(int(match[1]), int(match[2] or 0)): entry for match, entry in found if match}


def read_stored(path: Path) -> dict[str, Any] | None:
    """The ``args`` of the first rank; ``None`` where it holds none.

    Raises:
        CheckpointError: if the file is missing or damaged.
    """
    first = _folders(path)[min(_folders(path))] / FILE
    return args_of(_load(first), first)


def found_layout(path: Path) -> tuple[int, int]:
    """Tensor-parallel ranks and pipeline stages by the folders that are there."""
    ranks, stages = zip(*_folders(path))
    return max(ranks) + 1, max(stages) + 1


def embedding_rows(path: Path) -> int:
    """Rows of the embedding over all tensor-parallel ranks, padding included.

    Raises:
        CheckpointError: if a rank's file is missing or damaged, or holds none.
    """
    rows = 0
    for (_, stage), folder in _folders(path).items():
        if stage == 0:
            table = _chunks(_load(folder / FILE))[0].get(WORD_EMBEDDINGS.name)
            if not isinstance(table, torch.Tensor) or table.dim() != 2:
                raise CheckpointError(f"{folder / FILE} holds no {WORD_EMBEDDINGS.name}")
            rows += table.shape[0]
    return rows


def _load(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise CheckpointError(f"{path} is missing: the checkpoint is not whole")
    content = torch_archive.read_objects(path)
    if not isinstance(content, dict) or not _chunks(content):
        raise CheckpointError(
            f"{path} holds no model of megatron-core",
            got=f"entries {shorten(sorted(map(str, content)))}" if isinstance(content, dict) else shorten(content),
            needed="a 'model' of megatron-core, or 'model0', 'model1' … of its virtual pipeline stages",
        )
    return content


def _chunks(content: dict[str, Any]) -> list[dict[str, Any]]:
    """The model chunks of a rank (several in a virtual pipeline), without the prefixes of modules that wrap a model."""
    virtual = [f"model{number}" for number in range(len(content))]
    names = ["model"] if "model" in content else [name for name in virtual if name in content]
    models = [content[name] for name in names]
    if not all(isinstance(model, dict) and "language_model" not in model for model in models):
        return []
    return [{unwrapped(str(name)): value for name, value in model.items()} for model in models]


def _chunk_tensors(
    config: ModelConfig, layers: range, *, first: bool, last: bool
) -> Iterator[tuple[str, str, int | None, MegatronTensor]]:
    """(name in the chunk, the same with local layers' names, global layer, tensor) of everything a model chunk holds."""
    for tensor in outer_tensors(config):
        if first if tensor is WORD_EMBEDDINGS else last:
            yield tensor.name, tensor.name, None, tensor
    if config.tie_embeddings and last and not first:
        yield OUTPUT_LAYER.name, OUTPUT_LAYER.name, None, WORD_EMBEDDINGS  # the last stage's own copy of the tied embedding
    for local, layer in enumerate(layers):
        for tensor in layer_tensors(config.of_layer(layer)):
            prefix = f"decoder.layers.{local}."
            yield prefix + tensor.name, prefix + tensor.local_name, layer, tensor


def open_map(path: Path, config: ModelConfig, layout: ParallelLayout) -> TensorMap:
    """Where every role tensor lies. Stages hold as many layers as they hold, one after the other.

    Raises:
        CheckpointError: if a rank's file is missing or damaged, or a tensor is missing, extra or of another shape.
    """
    ranks = ((rank, stage) for stage in range(layout.pipeline) for rank in range(layout.tensor))
    contents = {file: _load(file) for file in (path / rank_folder(*rank, layout) / FILE for rank in ranks)}
    chunks = {file: _chunks(content) for file, content in contents.items()}
    raise_all(CheckpointError, f"{path} is not of one piece", _unlike(contents, chunks))
    files = list(contents)
    stages = [files[start : start + layout.tensor] for start in range(0, len(files), layout.tensor)]
    order = [{file: chunks[file][virtual] for file in ranks} for virtual in range(len(chunks[files[0]])) for ranks in stages]
    found, problems, layer = TensorMap(config), [], 0
    for position, models in enumerate(order):
        held = max(map(_layer_count, models.values()))
        layers = range(min(layer, config.num_layers), min(layer + held, config.num_layers))
        layer += held
        ends = {"first": position == 0, "last": position == len(order) - 1}
        problems += _add_chunk(found, models, list(_chunk_tensors(config, layers, **ends)), layout)
    if layer != config.num_layers:
        problems.insert(0, f"{layer} layers in its {len(order)} model chunks, needed {config.num_layers}")
    extra_folders = {entry.name for entry in _folders(path).values()}
    extra_folders -= {rank_folder(r, s, layout) for r in range(layout.tensor) for s in range(layout.pipeline)}
    problems += [f"{folder}: more ranks than TP {layout.tensor} × PP {layout.pipeline}" for folder in sorted(extra_folders)]
    raise_all(CheckpointError, f"{path} does not hold the model that its args describe", problems)
    return found.validate(path)


def _unlike(contents: dict[Path, dict[str, Any]], chunks: dict[Path, list[dict[str, Any]]]) -> list[str]:
    """Ranks that say what they are otherwise than the first does."""
    first = next(iter(contents))
    alone = [file for file, content in contents.items() if ("args" in content) != ("args" in contents[first])]
    virtual = [file for file in contents if len(chunks[file]) != len(chunks[first])]
    return [f"{file}: args in some ranks only" for file in alone] + [
        f"{file}: {len(chunks[file])} model chunks, {len(chunks[first])} in {first}" for file in virtual
    ]


def _layer_count(model: dict[str, Any]) -> int:
    numbers = [int(match[1]) for match in map(_LAYER.match, model) if match]
    return max(numbers, default=-1) + 1


def _add_chunk(
    found: TensorMap,
    models: dict[Path, dict[str, Any]],
    tensors: list[tuple[str, str, int | None, MegatronTensor]],
    layout: ParallelLayout,
) -> list[str]:
    """File what the ranks of one model chunk hold; say what is missing, extra or of another shape."""
    problems, expected = [], set()
    for name, local_name, layer, tensor in tensors:
        names = [next((n for n in (name, local_name) if n in model), None) for model in models.values()]
        expected |= {name, local_name}
        copy = name == OUTPUT_LAYER.name and tensor is WORD_EMBEDDINGS
        absent = [f"{file}: {name}: missing" for file, there in zip(models, names) if there is None]
        if copy and len(absent) == len(models):
            continue
        problems += absent
        if not absent:
            parts = [model[there] for model, there in zip(models.values(), names)]
            problems += _add(found, tensor, layer, found.config, layout, list(zip(models, parts)), copy)
    for file, model in models.items():
        extra = [key for key in model if key not in expected and not key.endswith("_extra_state")]
        problems += [f"{file}: {shorten(key)}: not a tensor of this model" for key in extra]
    return problems


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
    config = config.of_layer(layer)
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
            found.add(
                layer, region, patches(tensor, config, full[0], mine), replica=copy or (tensor.split == "none" and rank > 0)
            )
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
            layers = layout.stage_layers(stage, config.num_layers)
            ends = {"first": stage == 0, "last": stage == layout.pipeline - 1}
            for name, local_name, layer, tensor in _chunk_tensors(config, layers, **ends):
                full = tensor.full_shape(config.of_layer(layer), layout)
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
    for local, layer in enumerate(layout.stage_layers(stage, config.num_layers)):
        names = extra_states.of_layer(config.of_layer(layer), local_names=local_names)
        yield from (f"decoder.layers.{local}.{name}" for name in names)
    if stage == layout.pipeline - 1 and not local_names:
        yield extra_states.FINAL_NORM
