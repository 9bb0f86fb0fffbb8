"""Hugging Face directories: ``config.json``, safetensors (or ``.bin``) files with an optional index, tokenizer files."""

from __future__ import annotations

import json
import re
import shutil
from dataclasses import dataclass, field
from math import prod
from pathlib import Path
from typing import Any, Callable

import torch
from safetensors.torch import load_file, save_file

from megatron_prune.arch.model import ModelConfig
from megatron_prune.arch.sharding import Block
from megatron_prune.arch.tensors import TensorId, tensor_ids, tensor_shape
from megatron_prune.checkpoint import safetensors_file, torch_archive
from megatron_prune.checkpoint.manifest import RECIPE_FILE, Recipe
from megatron_prune.checkpoint.tensor_map import TensorMap
from megatron_prune.errors import CheckpointError, InputError, raise_all
from megatron_prune.families.family import BUFFERS, Family, family_of
from megatron_prune.files.region import Region

CONFIG, SINGLE, INDEX = "config.json", "model.safetensors", "model.safetensors.index.json"
BUFFERS_FILE = "rotary_buffers.safetensors"
"""Where a Megatron checkpoint keeps :attr:`HuggingFaceModel.buffers` for the way back."""
_BIN, _BIN_INDEX = "pytorch_model.bin", "pytorch_model.bin.index.json"
_WEIGHTS = (".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".gguf", ".h5", ".msgpack", ".onnx", ".index.json")
_SIDE_FOLDERS = ("additional_chat_templates",)
VOCABULARY_FILES = re.compile(r"tokenizer\.json|vocab\.(json|txt)|merges\.txt|added_tokens\.json|.*\.model")
"""Files that say which token has which id."""


@dataclass
class HuggingFaceModel:
    """An opened directory.

    Attributes:
        tensors: where the role tensors lie; a stored copy of a tied output layer is a replica of the embedding.
        buffers: rotary tables some old checkpoints store, by name.
    """

    path: Path
    hf_config: dict[str, Any]
    family: Family
    config: ModelConfig
    tensors: TensorMap
    buffers: dict[str, tuple[Region, tuple[int, ...]]] = field(default_factory=dict)

    @property
    def tied_head_stored(self) -> bool:
        return bool(self.tensors.replicas)


def is_huggingface(path: Path) -> bool:
    """Whether ``path`` looks like a Hugging Face model directory."""
    return (path / CONFIG).is_file()


def read_config(path: Path) -> dict[str, Any]:
    """``config.json`` of a directory (or that very file) as it stands.

    Raises:
        CheckpointError: if it is missing or not a JSON object.
    """
    file = path if path.is_file() else path / CONFIG
    try:
        data = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise CheckpointError(f"{path} has no {CONFIG}", needed="a Hugging Face model directory") from None
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{file} is not JSON", got=str(error)) from None
    if not isinstance(data, dict):
        raise CheckpointError(f"{file} is not a JSON object")
    return data


def open_model(path: Path) -> HuggingFaceModel:
    """Open a directory and check it against its configuration.

    Raises:
        CheckpointError: naming each tensor that is missing, extra or of the wrong shape, and each damaged file.
    """
    hf_config = read_config(path)
    family = family_of(hf_config)
    config = family.model_config(hf_config)
    stored = _stored_tensors(path)
    tensors, problems, buffers = TensorMap(config), [], {}
    for tensor in tensor_ids(config):
        name = family.tensor_name(tensor)
        if name not in stored:
            problems.append(f"{name}: missing")
            continue
        region, shape = stored.pop(name)
        problems += _add(tensors, tensor, name, region, shape, replica=False)
    head = family.names["output"]
    if config.tie_embeddings and head in stored:
        region, shape = stored.pop(head)
        problems += _add(tensors, TensorId("embedding"), head, region, shape, replica=True)
    for name in sorted(stored):
        if BUFFERS.fullmatch(name):
            buffers[name] = stored[name]
        else:
            problems.append(f"{name}: not a tensor of a {family.name} model with this config.json")
    raise_all(CheckpointError, f"{path} does not hold the model that its config.json describes", problems)
    tensors.validate(path).expect(Recipe.load(path).digests, path / RECIPE_FILE)
    return HuggingFaceModel(path, hf_config, family, config, tensors, buffers)


def _add(tensors: TensorMap, tensor: TensorId, name: str, region: Region, shape: tuple[int, ...], *, replica: bool) -> list[str]:
    needed = tensor_shape(tensor.role, tensors.config)
    if shape != needed:
        return [f"{name}: shape {shape}, needed {needed}"]
    tensors.add(tensor.layer, region, [Block(tensor.role, 0, 0, 0, region.rows, region.cols)], replica=replica)
    return []


def _stored_tensors(path: Path) -> dict[str, tuple[Region, tuple[int, ...]]]:
    """Name → (region, shape) over all weight files."""
    for single, index, read in (
        (SINGLE, INDEX, safetensors_file.read_header),
        (_BIN, _BIN_INDEX, _read_bin),
    ):
        if (path / single).is_file():
            return read(path / single)
        if (path / index).is_file():
            return _read_indexed(path, index, read)
    raise CheckpointError(f"{path} has no weights", needed=f"{SINGLE}, or {INDEX} and the files it names")


def _read_indexed(path: Path, index: str, read) -> dict[str, tuple[Region, tuple[int, ...]]]:
    try:
        weight_map = json.loads((path / index).read_text(encoding="utf-8"))["weight_map"]
        files = sorted(set(weight_map.values()))
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{path / index} is damaged", got=repr(error)) from None
    for name in files:
        if not isinstance(name, str) or Path(name).name != name or name in ("", ".", ".."):
            raise CheckpointError(f"{path / index} names a file outside its directory", got=repr(name))
    raise_all(
        CheckpointError,
        f"{path} lacks files that its index names",
        [f"{name}: missing" for name in files if not (path / name).is_file()],
        do="fetch the model again",
    )
    stored, problems = {}, []
    for file in files:
        for name, found in read(path / file).items():
            if weight_map.get(name) == file:
                stored[name] = found
            else:
                problems.append(f"{name}: in {file}, but the index says {weight_map.get(name, 'nothing of it')}")
    problems += [f"{name}: not in {file}, where the index says it is" for name, file in weight_map.items() if name not in stored]
    raise_all(CheckpointError, f"{path / index} and the files do not agree", problems)
    return stored


def _read_bin(path: Path) -> dict[str, tuple[Region, tuple[int, ...]]]:
    content = torch_archive.read_objects(path)
    if not isinstance(content, dict) or not all(isinstance(value, torch.Tensor) for value in content.values()):
        raise CheckpointError(f"{path} is not a state dict")
    return {name: (torch_archive.region_of(value, path), tuple(value.shape)) for name, value in content.items()}


# ---------------------------------------------------------------------------------------------------------- writing


def lay_out(
    path: Path,
    config: ModelConfig,
    family: Family,
    hf_config: dict[str, Any],
    dtypes: dict[TensorId, torch.dtype],
    *,
    max_shard_bytes: int,
    tied_head_stored: bool = False,
    buffers: dict[str, torch.Tensor] | None = None,
    config_text: str | None = None,
) -> None:
    """Create ``config.json`` and weight files with every tensor zero; bytes are filled in through :func:`open_model`.

    Args:
        dtypes: element type of every role tensor.
        max_shard_bytes: a file that would grow larger is followed by another (a tensor is never split).
        tied_head_stored: store the tied output layer a second time.
        buffers: small tensors to store as they are (see :func:`load_buffers`); they are written at once.
        config_text: the file's exact text, where ``hf_config`` is unchanged from one that was read.
    """
    tensors = {family.tensor_name(tensor): (dtypes[tensor], tensor_shape(tensor.role, config)) for tensor in tensor_ids(config)}
    if tied_head_stored and config.tie_embeddings:
        tensors[family.names["output"]] = tensors[family.names["embedding"]]
    tensors.update({name: (buffer.dtype, tuple(buffer.shape)) for name, buffer in (buffers or {}).items()})
    shards: list[dict] = [{}]
    used = 0
    for name, (dtype, shape) in tensors.items():
        size = prod(shape) * dtype.itemsize
        if shards[-1] and used + size > max_shard_bytes:
            shards.append({})
            used = 0
        shards[-1][name] = (dtype, shape)
        used += size
    files = [SINGLE] if len(shards) == 1 else [f"model-{i + 1:05d}-of-{len(shards):05d}.safetensors" for i in range(len(shards))]
    for file, content in zip(files, shards):
        safetensors_file.lay_out(path / file, content)
    if len(shards) > 1:
        total = sum(prod(shape) * dtype.itemsize for dtype, shape in tensors.values())
        weight_map = {name: file for file, content in zip(files, shards) for name in content}
        index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
        (path / INDEX).write_text(json.dumps(index, indent=2) + "\n")
    for file in files if buffers else []:
        for name, (region, _) in safetensors_file.read_header(path / file).items():
            if name in buffers:
                region.write_from(buffers[name].contiguous())
    (path / CONFIG).write_text(config_text or json.dumps(hf_config, indent=2) + "\n", encoding="utf-8")


def save_buffers(model: HuggingFaceModel, folder: Path) -> None:
    """Keep a model's stored rotary tables in ``folder``, if it has any."""
    if model.buffers:
        data = {}
        for name, (region, shape) in model.buffers.items():
            data[name] = torch.empty(shape, dtype=region.dtype)
            region.read_into(data[name])
        save_file(data, folder / BUFFERS_FILE)


def load_buffers(folder: Path | None) -> dict[str, torch.Tensor]:
    """What :func:`save_buffers` kept; empty if nothing."""
    file = folder / BUFFERS_FILE if folder else None
    return load_file(file) if file and file.is_file() else {}


def copy_side_files(source: Path, target: Path) -> None:
    """Copy what is not weights: configuration, tokenizer, chat templates, licence (links are followed)."""
    for entry in sorted(source.iterdir()):
        if entry.name.startswith(".") or (entry.name.endswith(_WEIGHTS) and entry.name != BUFFERS_FILE):
            continue
        if entry.is_file():
            shutil.copyfile(entry, target / entry.name)
        elif entry.is_dir() and entry.name in _SIDE_FOLDERS:
            shutil.copytree(entry, target / entry.name, dirs_exist_ok=True)


def resolve(name_or_path: str, *, weights: bool = True) -> Path:
    """A local directory, or the snapshot of a hub id (fetched on first use).

    Args:
        weights: fetch them too; a tokenizer needs none.

    Raises:
        InputError: if it is neither.
    """
    path = Path(name_or_path).expanduser()
    if path.is_dir():
        return path
    from huggingface_hub import HfApi, snapshot_download

    def fetch() -> str:
        files = HfApi().list_repo_files(name_or_path)
        ignored = ["original/*", "consolidated*", "*.gguf", "*.pt", "*.pth", "*.onnx", "onnx/*", "*.msgpack", "*.h5"]
        if not weights:
            ignored += ["*.bin", "*.safetensors"]
        elif any(file.endswith(".safetensors") for file in files):
            ignored.append("*.bin")
        return snapshot_download(name_or_path, ignore_patterns=ignored)

    return Path(_from_hub(name_or_path, fetch))


_HUB_ID = re.compile(r"\w[\w.-]*/[\w.-]+")
"""``owner/name``."""


def fetch_config(name: str) -> Path:
    """``config.json`` of a hub id, and nothing else of it.

    Raises:
        InputError: if there is none.
    """
    from huggingface_hub import hf_hub_download

    return Path(_from_hub(name, lambda: hf_hub_download(name, CONFIG)))


def _from_hub(name: str, fetch: Callable[[], str]) -> str:
    """What ``fetch`` brings; an offline machine serves what it fetched before."""
    if Path(name).exists() or Path(name).parent != Path() and Path(name).parent.is_dir() or not _HUB_ID.fullmatch(name):
        raise InputError(f"no such model directory: {name}")
    from huggingface_hub import snapshot_download

    try:
        return fetch()
    except Exception as error:  # the HTTP client's own kinds are no part of any interface
        try:
            return snapshot_download(name, local_files_only=True)
        except Exception:
            raise InputError(
                f"{name} is neither a directory nor a model that can be fetched from the hub", got=str(error).split("\n")[0]
            ) from None
