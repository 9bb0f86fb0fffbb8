"""``torch_dist``: megatron-core's distributed checkpoint, readable at any TP × PP.

Files: ``.metadata`` (a pickle of ``torch.distributed.checkpoint.metadata.Metadata``), ``__{rank}_{n}.distcp`` (one
``torch.save`` archive after another, one per chunk of a tensor), ``common.pt`` (``args`` and the like) and
``metadata.json``. Layers are stacked: key ``decoder.layers.mlp.linear_fc2.weight`` has shape [L, h, F]; where layers are of
different shapes each has keys of its own (``decoder.layers.3.mlp…``), and such are read in any case. ``linear_fc1`` is gate then up over all ranks, whatever the TP size.
"""

from __future__ import annotations

import io
import json
import pickle
import re
from argparse import Namespace
from pathlib import Path
from typing import Any, Iterator

import torch
from torch.distributed.checkpoint import filesystem, planner
from torch.distributed.checkpoint import metadata as dcp

from megatron_prune.arch.model import ModelConfig
from megatron_prune.arch.sharding import (
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
from megatron_prune.checkpoint.stored_args import args_of, run_config, unwrapped
from megatron_prune.checkpoint.tensor_map import TensorMap
from megatron_prune.errors import CheckpointError, raise_all, reason
from megatron_prune.files.documents import read_bytes, read_json, shorten
from megatron_prune.files.pickled import read_pickle
from megatron_prune.files.region import Region

COMMON, METADATA, VERSION_FILE = "common.pt", ".metadata", "metadata.json"
COMMON_OBJECT = "common_state/shard_0_1"
"""What megatron-core writes since 0.19 in place of ``common.pt``."""
_LAYER_KEY = re.compile(r"decoder\.layers\.(?:(\d+)\.)?(.+)")


def is_torch_dist(path: Path) -> bool:
    """Whether ``path`` looks like a distributed checkpoint (whole or not)."""
    return (path / METADATA).exists() or (path / VERSION_FILE).exists()


# ---------------------------------------------------------------------------------------------------------- reading


_KNOWN = {
    **torch_archive.DTYPES,
    **{
        f"{module.__name__}.{name}": getattr(module, name)
        for module, names in (
            (
                dcp,
                "Metadata TensorStorageMetadata BytesStorageMetadata ChunkStorageMetadata TensorProperties "
                "MetadataIndex StorageMeta _MEM_FORMAT_ENCODING",
            ),
            (filesystem, "_StorageInfo"),
            (planner, "SavePlan WriteItem WriteItemType TensorWriteData BytesIOWriteData"),
        )
        for name in names.split()
        if hasattr(module, name)
    },
    "megatron.core.dist_checkpointing.strategies.torch.MCoreMetadata": dcp.Metadata,  # a subclass; of core 0.15
    "torch.Size": torch.Size,
    "torch.serialization._get_layout": torch.serialization._get_layout,
    "collections.OrderedDict": dict,
    **{f"{module}.PosixPath": lambda *parts: "/".join(parts) for module in ("pathlib", "pathlib._local")},
}
"""What a checkpoint's ``.metadata`` is built of."""


def read_metadata(path: Path) -> dcp.Metadata:
    """What ``.metadata`` says, every part of its type and every file that it names whole and beside it.

    Raises:
        CheckpointError: if it is missing, damaged, or names something that is not there.
    """
    if not (path / METADATA).exists():
        raise CheckpointError(f"{path} lacks {METADATA}: the checkpoint was never finished")
    metadata = read_pickle(read_bytes(path / METADATA), path / METADATA, known=_KNOWN)
    try:
        _check_metadata(metadata)
    except (AttributeError, TypeError, ValueError) as error:
        raise CheckpointError(f"{path / METADATA} is not the metadata of a checkpoint", got=str(error)[:200]) from None
    _check_files(path, metadata)
    return metadata


def _check_metadata(metadata: Any) -> None:
    """Raise an error of Python's own unless every part is of its type: what a pickle holds may be anything."""
    for index, info in metadata.storage_data.items():
        if not isinstance(index, dcp.MetadataIndex) or not isinstance(info.relative_path, str):
            raise TypeError(f"an entry of storage {shorten(index)}")
        _check_numbers((info.offset, info.length))
    for key, entry in metadata.state_dict_metadata.items():
        if not isinstance(key, str):
            raise TypeError(f"a key {shorten(key)}")
        if isinstance(entry, dcp.TensorStorageMetadata):
            if not isinstance(entry.properties.dtype, torch.dtype):
                raise TypeError(f"{shorten(key)} of dtype {shorten(entry.properties.dtype)}")
            _check_numbers(entry.size)
            for chunk in entry.chunks:
                _check_numbers((*chunk.offsets, *chunk.sizes))
                if not len(chunk.offsets) == len(chunk.sizes) == len(entry.size):
                    raise ValueError(f"a chunk of {shorten(key)} of another number of dimensions")


def _check_numbers(numbers: Any) -> None:
    for number in numbers:
        if type(number) is not int or not 0 <= number < 1 << 62:
            raise ValueError(f"a size or place of {shorten(number)}")


def read_stored(path: Path) -> dict[str, Any] | None:
    """The ``args`` in ``common.pt`` (megatron-core 0.19: in an object beside the tensors), or Bridge's in ``run_config.yaml``.

    Raises:
        CheckpointError: if the checkpoint is not whole.
    """
    if not (path / VERSION_FILE).is_file():
        raise CheckpointError(f"{path} lacks {VERSION_FILE}: the checkpoint was never finished")
    backend = read_json(path / VERSION_FILE).get("sharded_backend")
    if backend != "torch_dist":
        raise CheckpointError(f"{path}: sharded_backend", got=shorten(backend), needed="'torch_dist'")
    common = _common(path)
    if not isinstance(common, dict):
        raise CheckpointError(f"{path}: its common state", got=shorten(common), needed="a dictionary")
    args = args_of(common, path)
    return run_config(path) if args is None else args


def _common(path: Path) -> Any:
    """What is no tensor: training state, and ``args``."""
    if (path / COMMON).exists():
        return torch_archive.read_objects(path / COMMON)
    storage = read_metadata(path).storage_data
    info = next((info for index, info in storage.items() if index.fqn == COMMON_OBJECT), None)
    if info is None:
        raise CheckpointError(f"{path} lacks {COMMON}: the checkpoint was never finished")
    held = torch_archive.read_objects(_inside(path, info), offset=info.offset, length=info.length)
    return held[0] if isinstance(held, list) and len(held) == 1 else held


def _inside(path: Path, info: filesystem._StorageInfo) -> Path:
    if Path(info.relative_path).name != info.relative_path:
        raise CheckpointError(f"{path / METADATA} names a file outside the checkpoint", got=shorten(info.relative_path))
    return path / info.relative_path


def found_layout(path: Path) -> tuple[int, int]:
    """Any layout reads it: one rank, one stage."""
    return 1, 1


def embedding_rows(path: Path) -> int:
    """Rows of the embedding, padding included.

    Raises:
        CheckpointError: if there is none.
    """
    for key, entry in read_metadata(path).state_dict_metadata.items():
        if isinstance(entry, dcp.TensorStorageMetadata) and unwrapped(key) == WORD_EMBEDDINGS.name and len(entry.size) == 2:
            return entry.size[0]
    raise CheckpointError(f"{path} holds no {WORD_EMBEDDINGS.name}")


def open_map(path: Path, config: ModelConfig, layout: ParallelLayout) -> TensorMap:
    """Where every role tensor lies.

    Raises:
        CheckpointError: if a file is missing or truncated, or a tensor is missing, extra or of another shape.
    """
    metadata = read_metadata(path)
    try:
        return _map(path, metadata, config, layout).validate(path)
    except (KeyError, TypeError, AttributeError, ValueError, IndexError) as error:
        raise CheckpointError(f"{path / METADATA} does not fit the files", got=reason(error)) from None


def read_tensors(path: Path, prefix: str) -> dict[str, torch.Tensor]:
    """Full matrices of a checkpoint whose keys begin with ``prefix``, in the dtype as stored.

    Raises:
        CheckpointError: if a file is missing, truncated or damaged.
    """
    metadata, found = read_metadata(path), {}
    for key, entry in metadata.state_dict_metadata.items():
        if isinstance(entry, dcp.TensorStorageMetadata) and key.startswith(prefix):
            found[key] = torch.empty(entry.size, dtype=entry.properties.dtype)
            for _, region, held in _chunks(path, metadata, key, entry, False, 0):
                part = torch.empty(region.rows, region.cols, dtype=region.dtype)
                region.read_into(part)
                found[key][held.rows[0].start : held.rows[0].stop, held.cols.start : held.cols.stop] = part
    return found


def _map(path: Path, metadata: dcp.Metadata, config: ModelConfig, layout: ParallelLayout) -> TensorMap:
    known_inner = [{tensor.name: tensor for tensor in layer_tensors(config.of_layer(n))} for n in range(config.num_layers)]
    known_outer = {tensor.name: tensor for tensor in outer_tensors(config)}
    found, problems = TensorMap(config), []
    for key, entry in metadata.state_dict_metadata.items():
        if not isinstance(entry, dcp.TensorStorageMetadata) or key.startswith(("optimizer.", "rng_state", "chained_")):
            continue
        match = _LAYER_KEY.fullmatch(unwrapped(key))
        name, half = (match[2], None) if match else (unwrapped(key), None)
        if name.endswith(("linear_fc1.weight_w", "linear_fc1.weight_v")):
            name, half = name[:-2], name[-1]
        stacked = match is not None and match[1] is None
        number = int(match[1]) if match and not stacked else None
        if stacked and not config.is_uniform or number is not None and number >= config.num_layers:
            problems.append(f"{key}: not a tensor of this model")
            continue
        tensor = (known_inner[number or 0] if match else known_outer).get(name)
        if tensor is None:
            problems.append(f"{key}: not a tensor of this model")
            continue
        described = config.of_layer(number)
        full = tensor.full_shape(described, layout)
        expected = (full[0] // 2, *full[1:]) if half else full
        if tuple(entry.size) != ((config.num_layers, *expected) if stacked else expected):
            problems.append(f"{key}: shape {tuple(entry.size)}, needed {(config.num_layers, *expected) if stacked else expected}")
            continue
        base = full[0] // 2 if half == "v" else 0
        for layer, region, held in _chunks(path, metadata, key, entry, stacked, base):
            found.add(layer if stacked else number, region, patches(tensor, described, full[0], held))
    raise_all(CheckpointError, f"{path} does not hold the model that its args describe", problems)
    return found


def _check_files(path: Path, metadata: dcp.Metadata) -> None:
    ends: dict[str, int] = {}
    for info in metadata.storage_data.values():
        _inside(path, info)
        ends[info.relative_path] = max(ends.get(info.relative_path, 0), info.offset + info.length)
    problems = []
    for name, end in sorted(ends.items()):
        size = (path / name).stat().st_size if (path / name).is_file() else -1
        if size < end:
            problems.append(f"{name}: " + ("missing" if size < 0 else f"{size} bytes, needed {end}"))
    raise_all(CheckpointError, f"{path} is not whole", problems)


def _chunks(
    path: Path, metadata: dcp.Metadata, key: str, entry: dcp.TensorStorageMetadata, stacked: bool, base: int
) -> Iterator[tuple[int | None, Region, Shard]]:
    """Every chunk of a tensor, one layer at a time: (layer or None, its bytes, what it holds of the full tensor)."""
    for chunk in entry.chunks:
        info = metadata.storage_data[dcp.MetadataIndex(key, chunk.offsets)]
        stored = torch_archive.read_objects(path / info.relative_path, offset=info.offset, length=info.length)
        if tuple(stored.shape) != tuple(chunk.sizes) or stored.dtype != entry.properties.dtype:
            raise CheckpointError(f"{path / info.relative_path}: {key}", got=(stored.shape, stored.dtype), needed=chunk)
        whole = torch_archive.region_of(stored, path / info.relative_path)
        offsets, sizes, layers = list(chunk.offsets), list(chunk.sizes), [None]
        if stacked:
            first, count = offsets.pop(0), sizes.pop(0)
            layers = range(first, first + count)
        rows, cols = sizes[0], sizes[1] if len(sizes) > 1 else 1
        left = offsets[1] if len(offsets) > 1 else 0
        held = Shard((range(base + offsets[0], base + offsets[0] + rows),), range(left, left + cols))
        for position, layer in enumerate(layers):
            start = whole.offset + position * rows * cols * whole.dtype.itemsize
            yield layer, Region(whole.path, start, rows, cols, whole.dtype), held


# ---------------------------------------------------------------------------------------------------------- writing


def lay_out(
    path: Path,
    config: ModelConfig,
    layout: ParallelLayout,
    dtypes: dict[TensorId, torch.dtype],
    args: Namespace,
    sizes: dict[tuple[str, int], list[int]],
) -> None:
    """Create the files of a checkpoint with every tensor zero; the bytes are filled in through :func:`open_map`.

    Args:
        path: an existing empty directory.
        dtypes: element type of every role tensor.
        args: what ``common.pt`` is to hold.
        sizes: (axis, layer) → units of every rank, where shards are of unequal size.
    """
    metadata = dcp.Metadata(state_dict_metadata={}, planner_data=None, storage_data={})
    files = {
        (rank, stage): open(path / f"__{stage * layout.tensor + rank}_0.distcp", "wb")
        for rank in range(layout.tensor)
        for stage in range(layout.pipeline)
    }
    try:
        for key, layer, rank, part, full in _parts(config, layout, sizes):
            dtype = dtypes[TensorId(part[0].roles[0], layer)]
            entry = metadata.state_dict_metadata.setdefault(key, _entry(full, dtype))
            stage = layout.stage_of(layer, config.num_layers) if layer is not None else _outer_stage(part[0], layout)
            for chunk in _chunk_rects(part, layer if config.is_uniform else None, len(full)):
                entry.chunks.append(chunk)
                index = dcp.MetadataIndex(key, chunk.offsets)
                content = torch_archive.empty_tensor(tuple(chunk.sizes), dtype)
                metadata.storage_data[index] = _append(files[rank, stage], content)
        for key, stage in _empty_objects(config, layout):
            metadata.state_dict_metadata[key] = dcp.BytesStorageMetadata()
            metadata.storage_data[dcp.MetadataIndex(key)] = _append(files[0, stage], [None])
    finally:
        for file in files.values():
            file.close()
    (path / METADATA).write_bytes(pickle.dumps(metadata))
    torch.save({"args": args, "checkpoint_version": 3.0, "iteration": 0}, path / COMMON)
    version = {
        "sharded_backend": "torch_dist",
        "sharded_backend_version": 1,
        "common_backend": "torch",
        "common_backend_version": 1,
    }
    (path / VERSION_FILE).write_text(json.dumps(version))


def _parts(
    config: ModelConfig, layout: ParallelLayout, sizes: dict[tuple[str, int], list[int]]
) -> Iterator[tuple[str, int | None, int, tuple[MegatronTensor, Shard], tuple[int, ...]]]:
    """(key, layer, rank, (tensor, what the rank holds), full shape with the layer dimension) in writing order."""
    outer = [(None, tensor) for tensor in outer_tensors(config)]
    inner = [(n, tensor) for n in range(config.num_layers) for tensor in layer_tensors(config.of_layer(n))]
    for layer, tensor in outer + inner:
        full = tensor.full_shape(config.of_layer(layer), layout)
        key, shape = tensor.name if layer is None else f"{_layer_prefix(config, layer)}{tensor.name}", full
        if layer is not None and config.is_uniform:
            shape = (config.num_layers, *full)
        split = shard_sizes(tensor, layer, config, sizes)
        for rank in range(layout.tensor if tensor.split != "none" else 1):
            yield key, layer, rank, (tensor, shard(tensor, full, layout.tensor, rank, split)), shape


def _empty_objects(config: ModelConfig, layout: ParallelLayout) -> Iterator[tuple[str, int]]:
    """(key, pipeline stage) of the extra states."""
    for layer in range(config.num_layers):
        place = f"/shard_{layer}_{config.num_layers}" if config.is_uniform else "/shard_0_1"
        for name in extra_states.of_layer(config.of_layer(layer), local_names=False):
            yield _layer_prefix(config, layer) + name + place, layout.stage_of(layer, config.num_layers)
    yield f"{extra_states.FINAL_NORM}/shard_0_1", layout.pipeline - 1


def _layer_prefix(config: ModelConfig, layer: int) -> str:
    """What a layer's keys begin with: those of all layers are one where these are alike in shape."""
    return "decoder.layers." if config.is_uniform else f"decoder.layers.{layer}."


def _outer_stage(tensor: MegatronTensor, layout: ParallelLayout) -> int:
    return 0 if tensor is WORD_EMBEDDINGS else layout.pipeline - 1


def _entry(size: tuple[int, ...], dtype: torch.dtype) -> dcp.TensorStorageMetadata:
    return dcp.TensorStorageMetadata(properties=dcp.TensorProperties(dtype=dtype), size=torch.Size(size), chunks=[])


def _chunk_rects(part: tuple[MegatronTensor, Shard], layer: int | None, dims: int) -> Iterator[dcp.ChunkStorageMetadata]:
    tensor, held = part
    vector = dims - (layer is not None) == 1
    for rows in held.rows:
        if not len(rows) or not len(held.cols):
            continue
        offsets = [rows.start] if vector else [rows.start, held.cols.start]
        lengths = [len(rows)] if vector else [len(rows), len(held.cols)]
        if layer is not None:
            offsets, lengths = [layer, *offsets], [1, *lengths]
        yield dcp.ChunkStorageMetadata(offsets=torch.Size(offsets), sizes=torch.Size(lengths))


def _append(file: io.BufferedWriter, content: Any) -> filesystem._StorageInfo:
    start = file.tell()
    length = torch_archive.lay_out(content, file)
    return filesystem._StorageInfo(Path(file.name).name, start, length)
