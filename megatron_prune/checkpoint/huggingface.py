"""Hugging Face directories: ``config.json``, safetensors (or ``.bin``) files with an optional index, tokenizer files."""

from __future__ import annotations

import json
import os
import re
import shutil
from dataclasses import dataclass, field
from math import prod
from pathlib import Path
from typing import Any

import torch

from megatron_prune.arch.model import ModelConfig
from megatron_prune.arch.sharding import Patch
from megatron_prune.arch.tensors import EMBEDDING, HEAD, TensorId, full_shape, tensor_ids
from megatron_prune.checkpoint import safetensors_file, weight_files
from megatron_prune.checkpoint.manifest import RECIPE_FILE, Recipe
from megatron_prune.checkpoint.model_folder import CONFIG, read_config
from megatron_prune.checkpoint.tensor_map import FLOATS, TensorMap
from megatron_prune.checkpoint.weight_files import INDEX, SINGLE, WEIGHTS
from megatron_prune.config import is_utf8
from megatron_prune.errors import CheckpointError, InputError, raise_all
from megatron_prune.families.family import Family, family_of
from megatron_prune.families.form import check_code, code_of, shipped_files
from megatron_prune.files.documents import LIMIT, read_json, shorten
from megatron_prune.files.region import Region
from megatron_prune.files.tensor_file import save_tensors

BUFFERS_FILE = "rotary_buffers.safetensors"
"""Where a Megatron checkpoint keeps :attr:`HuggingFaceModel.buffers` for the way back."""
_BUFFERS = re.compile(
    r"(.+\.)?(rotary_\w*emb|rope)\.(original_)?(inv_freq|freqs|cos|sin|cos_cached|sin_cached)|"
    r"(.+\.)?(inv_freq|freqs_cis|masked_bias|causal_mask|position_ids)"
)
"""Tables that old checkpoints store and transformers computes anew, whatever they hold: of positions, and of who sees whom."""
_SIDE_FOLDERS = ("additional_chat_templates",)
_TERMS = re.compile(r"(licen[cs]e|notice|copying|use_policy|acceptable_use).*", re.IGNORECASE)
VOCABULARY_FILES = re.compile(r"tokenizer\.json|vocab\.(json|txt)|merges\.txt|added_tokens\.json|.*\.model")
"""Files that say which token has which id."""


@dataclass
class HuggingFaceModel:
    """An opened directory.

    Attributes:
        tensors: where the role tensors lie; a stored copy of a tied output layer is a replica of the embedding.
        buffers: tables that some old checkpoints store and transformers computes anew, by name.
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

    @property
    def tied_head_dtype(self) -> torch.dtype | None:
        """Element type of a stored copy of a tied output layer."""
        copies = self.tensors.replicas.get(EMBEDDING)
        return copies[0].region.dtype if copies else None

    @property
    def in_safetensors(self) -> bool:
        return weight_files.in_safetensors(self.path)


def open_model(path: Path) -> HuggingFaceModel:
    """Open a directory and check it against its configuration.

    Raises:
        CheckpointError: naming each tensor that is missing, extra or of the wrong shape, and each damaged file.
    """
    hf_config = read_config(path)
    family = family_of(hf_config)
    config = family.model_config(hf_config)
    check_code(hf_config, path)
    stored = weight_files.stored_tensors(path)
    tensors, problems, buffers = TensorMap(config), [], {}
    for tensor in tensor_ids(config):
        name = family.tensor_name(tensor)
        if name not in stored:
            problems.append(f"{name}: missing")
            continue
        region, shape = stored.pop(name)
        problems += _add(tensors, tensor, name, region, shape, replica=False)
    head = family.tensor_name(HEAD)
    if config.tie_embeddings and head in stored:
        region, shape = stored.pop(head)
        problems += _add(tensors, EMBEDDING, head, region, shape, replica=True)
    for name in sorted(stored):
        if _BUFFERS.fullmatch(name):
            buffers[name] = stored[name]
        else:
            problems.append(f"{name}: not a tensor of a {family.name} model with this config.json")
    raise_all(CheckpointError, f"{path} does not hold the model that its config.json describes", problems)
    tensors.validate(path).expect(Recipe.load(path).digests, path / RECIPE_FILE)
    return HuggingFaceModel(path, hf_config, family, config, tensors, buffers)


def _add(tensors: TensorMap, tensor: TensorId, name: str, region: Region, shape: tuple[int, ...], *, replica: bool) -> list[str]:
    needed = full_shape(tensor, tensors.config)
    if shape != needed:
        return [f"{name}: shape {shape}, needed {needed}"]
    if region.dtype not in FLOATS:
        kind = str(region.dtype).removeprefix("torch.")
        return [f"{name}: dtype {kind}, needed plain weights (float32, bfloat16 or float16)"]
    tensors.add(tensor.layer, region, [Patch(tensor.role, 0, 0, 0, region.rows, region.cols)], replica=replica)
    return []


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
    """Create ``config.json``, the code of ours that it names, and weight files with every tensor zero; bytes are filled in
    through :func:`open_model`.

    Args:
        dtypes: element type of every role tensor (and of a stored copy of a tied output layer, if it has its own).
        max_shard_bytes: a file that would grow larger is followed by another (a tensor is never split).
        tied_head_stored: store the tied output layer a second time.
        buffers: small tensors to store as they are (see :func:`load_buffers`); they are written at once.
        config_text: the file's exact text, where ``hf_config`` is unchanged from one that was read.
    """
    tensors = {family.tensor_name(tensor): (dtypes[tensor], full_shape(tensor, config)) for tensor in tensor_ids(config)}
    if tied_head_stored and config.tie_embeddings:
        dtype, shape = tensors[family.tensor_name(EMBEDDING)]
        tensors[family.tensor_name(HEAD)] = dtypes.get(HEAD, dtype), shape
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
    for name in shipped_files():  # what lay beside the model that this one descends from
        (path / name).unlink(missing_ok=True)
    for name, content in code_of(hf_config).items():
        (path / name).write_bytes(content)
    (path / CONFIG).write_text(config_text or json.dumps(hf_config, indent=2) + "\n", encoding="utf-8")


def save_buffers(model: HuggingFaceModel, folder: Path) -> None:
    """Keep a model's stored tables in ``folder``, if it has any."""
    if model.buffers:
        save_tensors(folder / BUFFERS_FILE, _read_buffers(model.buffers))


def load_buffers(folder: Path | None) -> dict[str, torch.Tensor]:
    """What :func:`save_buffers` kept; empty if nothing."""
    file = folder / BUFFERS_FILE if folder else None
    if file is None or not file.exists():
        return {}
    stored = safetensors_file.read_header(file)
    strange = [shorten(name) for name in stored if not _BUFFERS.fullmatch(name)]
    raise_all(CheckpointError, f"{file} holds what is no table of positions or masks", strange, do="convert the model again")
    return _read_buffers(stored)


def _read_buffers(stored: weight_files.Stored) -> dict[str, torch.Tensor]:
    found = {}
    for name, (region, shape) in stored.items():
        found[name] = torch.empty(shape, dtype=region.dtype)
        region.read_into(found[name])
    return found


def side_files(source: Path) -> dict[str, Path]:
    """What is not weights, by its place in the directory: configuration, tokenizer, chat templates, licence.

    Links are followed within the directory, and within the repository's folder of the hub's cache.

    Raises:
        InputError: if one is a link to elsewhere, no regular file, of a name that is no text, or too large for what it should be.
    """
    found = {}
    for entry in sorted(source.iterdir()):
        if entry.name.startswith(".") or (entry.name.endswith(WEIGHTS) and entry.name != BUFFERS_FILE):
            continue
        if entry.is_dir() and entry.name not in _SIDE_FOLDERS:
            continue
        for file in sorted(entry.iterdir()) if entry.is_dir() and _is_within(entry, source) else [entry]:
            found[str(file.relative_to(source))] = file
    for file in found.values():
        if not is_utf8(file.name):
            raise InputError(f"{file}", got="a name that is not UTF-8", do="rename or remove it")
        if not _is_within(file, source):
            raise InputError(
                f"{file} is a link to {os.path.realpath(file)}, outside of the model's directory",
                do="put a copy in its place, or remove it",
            )
        if not file.is_file():
            got = "a link to nothing" if not file.exists() else "a directory, a pipe or a device"
            raise InputError(f"{file}", got=got, needed="a regular file", do="remove it")
        if (size := file.stat().st_size) > LIMIT:
            raise InputError(f"{file} beside the weights", got=f"{size} bytes", needed=f"at most {LIMIT}", do="move it elsewhere")
    return found


def terms(source: Path) -> dict[str, Path]:
    """Those of :func:`side_files` that say under which terms the model may be used."""
    return {name: file for name, file in side_files(source).items() if _TERMS.fullmatch(name)}


def _is_within(path: Path, source: Path) -> bool:
    """Whether a link leads to where what it brings in belongs: into the directory, or into the repository's blobs in a hub cache."""
    home, target = Path(os.path.realpath(source)), Path(os.path.realpath(path))
    blobs = [Path(os.path.realpath(home.parent.parent / "blobs"))] if home.parent.name == "snapshots" else []
    return any(root in target.parents for root in (home, *blobs))


def linked_weights(source: Path) -> list[str]:
    """Weight files that are links to elsewhere, each with its target."""
    files = [path for path in sorted(source.iterdir()) if path.name.endswith((".safetensors", ".bin"))]
    return [f"{path.name} → {os.path.realpath(path)}" for path in files if not _is_within(path, source)]


def copy_side_files(source: Path, target: Path) -> None:
    """Copy :func:`side_files`.

    Raises:
        InputError: if one may not be copied.
    """
    for name, file in side_files(source).items():
        (target / name).parent.mkdir(exist_ok=True)
        shutil.copyfile(file, target / name)


def tokenizer_bos(folder: Path) -> int | None:
    """The number of the token that a tokenizer names ``bos_token``, as its JSON files say it; ``None`` where they do not.

    Raises:
        CheckpointError: if one of them is damaged.
    """
    read = lambda name: read_json(folder / name) if (folder / name).is_file() else {}
    text = lambda token: token.get("content") if isinstance(token, dict) else token
    bos = text(read("tokenizer_config.json").get("bos_token"))
    added = read("tokenizer.json").get("added_tokens")
    ids = [token.get("id") for token in added if text(token) == bos] if bos and isinstance(added, list) else []
    return next((number for number in ids if type(number) is int), None)
