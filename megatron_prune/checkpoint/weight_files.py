"""The weight files of a Hugging Face directory, and where every tensor lies in them."""

from __future__ import annotations

from pathlib import Path

import torch

from megatron_prune.checkpoint import safetensors_file, torch_archive
from megatron_prune.checkpoint.model_folder import check_no_adapter
from megatron_prune.errors import CheckpointError, raise_all
from megatron_prune.files.documents import read_json, shorten
from megatron_prune.files.region import Region

Stored = dict[str, tuple[Region, tuple[int, ...]]]
"""Name → (place, shape) of a tensor."""

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
_BIN, _BIN_INDEX = "pytorch_model.bin", "pytorch_model.bin.index.json"
WEIGHTS = (".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".gguf", ".h5", ".msgpack", ".onnx", ".index.json")


def in_safetensors(path: Path) -> bool:
    """Whether a directory's weights are in safetensors files, which then count, as in transformers."""
    return (path / SINGLE).exists() or (path / INDEX).exists()


def stored_tensors(path: Path) -> Stored:
    """Everything in the weight files that transformers would read.

    Raises:
        CheckpointError: if there are none, one is damaged, or an adapter lies beside them.
    """
    check_no_adapter(path)
    read, single, index = (safetensors_file.read_header, SINGLE, INDEX) if in_safetensors(path) else (_read_bin, _BIN, _BIN_INDEX)
    if (path / single).exists():
        return read(path / single)
    if (path / index).exists():
        return _read_indexed(path, index, read)
    others = sorted(entry.name for entry in path.iterdir() if entry.name.endswith(WEIGHTS))[:5]
    raise CheckpointError(
        f"{path} has no weights",
        got=", ".join(map(shorten, others)) or None,
        needed=f"{SINGLE}, or {INDEX} and the files it names",
    )


def _read_indexed(path: Path, index: str, read) -> Stored:
    weight_map = read_json(path / index, do="fetch it again").get("weight_map")
    if not isinstance(weight_map, dict):
        raise CheckpointError(f"{path / index}: weight_map", got=shorten(weight_map), needed="a JSON object", do="fetch it again")
    for name in weight_map.values():
        if not isinstance(name, str) or Path(name).name != name or name in ("", ".", ".."):
            raise CheckpointError(f"{path / index} names a file outside its directory", got=shorten(name))
    files = sorted(set(weight_map.values()))
    raise_all(
        CheckpointError,
        f"{path} lacks files that its index names",
        [f"{name}: missing" for name in files if not (path / name).exists()],
        do="fetch the model again",
    )
    stored: Stored = {}
    problems = []
    for file in files:
        for name, found in read(path / file).items():
            if weight_map.get(name) == file:
                stored[name] = found
            else:
                problems.append(f"{name}: in {file}, but the index says {weight_map.get(name, 'nothing of it')}")
    problems += [f"{name}: not in {file}, where the index says it is" for name, file in weight_map.items() if name not in stored]
    raise_all(CheckpointError, f"{path / index} and the files do not agree", problems)
    return stored


def _read_bin(path: Path) -> Stored:
    content = torch_archive.read_objects(path)
    if not isinstance(content, dict) or not all(isinstance(value, torch.Tensor) for value in content.values()):
        raise CheckpointError(f"{path} is not a state dict")
    return {str(name): (torch_archive.region_of(value, path), tuple(value.shape)) for name, value in content.items()}
