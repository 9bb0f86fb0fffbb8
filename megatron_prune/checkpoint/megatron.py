"""Megatron checkpoint directories: tracker file, iteration directory, ``args``, and this project's manifest beside them.

ROOT/latest_checkpointed_iteration.txt       "release", or an iteration number
ROOT/release/  or  ROOT/iter_0000100/        torch_dist files, or mp_rank_XX folders
    megatron_prune.json                      manifest, written last
    plan.json                                the plan it was pruned by, if it was
    hf/                                      config.json, tokenizer and the like, for the way back
"""

from __future__ import annotations

import re
from argparse import Namespace
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from megatron_prune.arch.model import SHAPE_FIELDS, ModelConfig
from megatron_prune.arch.sharding import ParallelLayout
from megatron_prune.arch.tensors import TensorId, tensor_ids
from megatron_prune.checkpoint import legacy, manifest, torch_dist
from megatron_prune.checkpoint.digests import digest_file
from megatron_prune.checkpoint.manifest import Manifest
from megatron_prune.checkpoint.megatron_args import megatron_args, padded_as_stored, read_args
from megatron_prune.checkpoint.tensor_map import TensorMap
from megatron_prune.errors import CheckpointError
from megatron_prune.families.family import family_for

TRACKER, RELEASE, HF_FOLDER, PLAN_FILE = "latest_checkpointed_iteration.txt", "release", "hf", "plan.json"
FORMATS = ["torch_dist", "torch"]
_FORMATS = {"torch_dist": torch_dist, "torch": legacy}


@dataclass
class MegatronCheckpoint:
    """An opened checkpoint.

    Attributes:
        path: its iteration directory.
        format: ``"torch_dist"`` or ``"torch"``.
        layout: the parallel layout it was written in.
        manifest: this project's; made up from ``args`` for a checkpoint of Megatron-LM.
        own: whether this project wrote it.
    """

    path: Path
    format: str
    config: ModelConfig
    layout: ParallelLayout
    tensors: TensorMap
    manifest: Manifest
    own: bool

    @property
    def hf_folder(self) -> Path | None:
        """Configuration and tokenizer kept for the way back, if any."""
        folder = self.path / HF_FOLDER
        return folder if folder.is_dir() else None

    def edited_files(self) -> list[str]:
        """Configuration, tokenizer and other files beside the weights that are not as they were written, or gone."""
        return edited_files(self.path, self.manifest)


def is_megatron(path: Path) -> bool:
    """Whether ``path`` looks like a Megatron checkpoint: its root, or an iteration directory."""
    return (path / TRACKER).is_file() or torch_dist.is_torch_dist(path) or legacy.is_legacy(path)


def iteration_directory(path: Path) -> Path:
    """The directory that holds the checkpoint which ``path`` (a root or the directory itself) means.

    Raises:
        CheckpointError: if there is none, or the tracker names one that does not exist.
    """
    if torch_dist.is_torch_dist(path) or legacy.is_legacy(path):
        return path
    tracker = path / TRACKER
    if not tracker.is_file():
        raise CheckpointError(
            f"{path} is not a Megatron checkpoint",
            got=f"no {TRACKER}" if path.is_dir() else "no such directory",
            needed="a checkpoint root, or one of its iteration directories",
        )
    text = tracker.read_text(encoding="utf-8").strip()
    if text != RELEASE and not re.fullmatch(r"\d+", text):
        raise CheckpointError(f"{tracker}", got=repr(text[:40]), needed="an iteration number, or 'release'")
    folder = path / (text if text == RELEASE else f"iter_{int(text):07d}")
    if not (torch_dist.is_torch_dist(folder) or legacy.is_legacy(folder)):
        raise CheckpointError(
            f"{tracker} names {folder.name}, which holds no checkpoint", do="restore it, or correct the tracker"
        )
    return folder


def open_checkpoint(path: Path, *, vocab_size: int | None = None) -> MegatronCheckpoint:
    """Open a checkpoint of either format and check it against its own description.

    Args:
        vocab_size: the vocabulary without padding, for checkpoints of Megatron-LM, whose args may not tell it.

    Raises:
        CheckpointError: if it is incomplete, damaged, or holds other tensors than it describes.
    """
    folder = iteration_directory(path)
    name = "torch_dist" if torch_dist.is_torch_dist(folder) else "torch"
    room = _FORMATS[name]
    args = room.read_args(folder)
    config, layout = read_args(args, folder)
    own = (folder / manifest.FILE).is_file()
    if own:
        described = Manifest.load(folder / manifest.FILE)
        if described.adapter:
            raise CheckpointError(
                f"{folder} holds an adapter, not a model",
                do="merge it into its model with megatron-prune transfer (or export), and name that",
            )
        differing = [f for f in SHAPE_FIELDS if f != "vocab_size" and getattr(described.model, f) != getattr(config, f)]
        if differing:
            raise CheckpointError(f"{folder}: {manifest.FILE} and the stored args disagree on " + ", ".join(differing))
        config, layout = described.model, described.layout
    elif _written_by_us(folder):
        raise CheckpointError(f"{folder} has no {manifest.FILE}: its writing was never finished", do="make it again")
    else:
        if vocab_size is not None and vocab_size <= args.padded_vocab_size:
            config = replace(config, vocab_size=vocab_size)
            layout = padded_as_stored(layout, vocab_size, args.padded_vocab_size)
        described = Manifest(family=family_for(config).name, model=config, layout=layout)
    tensors = room.open_map(folder, config, layout).expect(described.digests, folder / manifest.FILE)
    check_structure(folder, described)
    if not described.digests and _holds_what_was_converted(described, tensors):
        tensors.content_id = described.content_id
    return MegatronCheckpoint(folder, name, config, layout, tensors, described, own)


def _holds_what_was_converted(described: Manifest, tensors: TensorMap) -> bool:
    """Whether the content id of a manifest without digests must be that of the stored tensors: no step or dtype came between."""
    names = {tensor: str(dtype).removeprefix("torch.") for tensor, dtype in stored_dtypes(tensors).items()}
    recorded = described.hf_dtypes
    converted = bool(recorded and described.content_id and described.recipe and described.recipe[-1].get("step") == "convert")
    return converted and all(recorded.get(str(tensor), recorded.get("default")) == name for tensor, name in names.items())


def _written_by_us(folder: Path) -> bool:
    return (folder / HF_FOLDER).is_dir() or any(part.endswith(".partial") for part in folder.parts)


def lay_out(
    root: Path,
    final_root: Path,
    config: ModelConfig,
    layout: ParallelLayout,
    dtypes: dict[TensorId, torch.dtype],
    *,
    ckpt_format: str,
    sizes: dict[tuple[str, int], list[int]] | None = None,
) -> Path:
    """Create an unfinished checkpoint with every tensor zero.

    Args:
        root: an existing empty directory (the partial output).
        final_root: where it will stand, for paths inside ``args``.
        dtypes: element type of every role tensor.
        sizes: (axis, layer) → units of every rank, where shards are of unequal size.

    Returns:
        Its iteration directory. It becomes a checkpoint with :func:`finish`.
    """
    folder = root / RELEASE
    folder.mkdir()
    tokenizer = str(final_root.absolute() / RELEASE / HF_FOLDER)
    args: Namespace = megatron_args(config, layout, dtypes[TensorId("embedding")], tokenizer)
    _FORMATS[ckpt_format].lay_out(folder, config, layout, dtypes, args, sizes or {})
    return folder


def open_target(folder: Path, config: ModelConfig, layout: ParallelLayout, ckpt_format: str) -> TensorMap:
    """Where the tensors of an unfinished checkpoint are to be written."""
    return _FORMATS[ckpt_format].open_map(folder, config, layout)


def finish(folder: Path, described: Manifest) -> None:
    """Write the manifest and the tracker of a checkpoint whose tensors are all in place."""
    write_manifest(folder, described)
    (folder.parent / TRACKER).write_text(folder.name)


def write_manifest(folder: Path, described: Manifest) -> None:
    """Write the manifest, with digests of all files that hold no weights."""
    files = [path for path in sorted(folder.rglob("*")) if path.is_file() and not _holds_weights(path.relative_to(folder))]
    found = {path.relative_to(folder).as_posix(): digest_file(path) for path in files}
    (folder / manifest.FILE).write_text(replace(described, files=found).dumps(), encoding="utf-8")


def check_structure(folder: Path, described: Manifest) -> None:
    """Refuse a checkpoint whose files that say where the tensors lie are not as they were written.

    Raises:
        CheckpointError: naming them.
    """
    changed = differing_files(folder, {name: digest for name, digest in described.files.items() if _is_structure(name)})
    if changed:
        raise CheckpointError(
            f"{folder}: {', '.join(changed)}",
            got="other bytes than were written: damaged, or of another checkpoint",
            do="restore the file, or make the checkpoint again",
        )


def edited_files(folder: Path, described: Manifest) -> list[str]:
    """Files beside the weights of a checkpoint that are not as they were written, or gone."""
    return differing_files(folder, {name: digest for name, digest in described.files.items() if not _is_structure(name)})


def differing_files(folder: Path, recorded: dict[str, str]) -> list[str]:
    """Names out of ``recorded`` of files that are gone, or whose digest is another."""
    return [name for name, digest in recorded.items() if not (folder / name).is_file() or digest_file(folder / name) != digest]


def _holds_weights(name: Path) -> bool:
    return name.suffix == ".distcp" or name.parts[0].startswith("mp_rank_")


def _is_structure(name: str) -> bool:
    """Whether a file says where the tensors lie and what they are; the others are for the way back."""
    return name in (torch_dist.METADATA, torch_dist.COMMON, torch_dist.VERSION_FILE)


def stored_dtypes(tensors: TensorMap) -> dict[TensorId, torch.dtype]:
    """Element type of every tensor of a map."""
    return {tensor: tensors.dtype(tensor) for tensor in tensor_ids(tensors.config)}
