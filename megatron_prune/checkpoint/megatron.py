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
from megatron_prune.arch.tensors import EMBEDDING, TensorId, tensor_ids
from megatron_prune.checkpoint import legacy, manifest, model_folder, torch_dist
from megatron_prune.checkpoint.description import Description, Told, check_flags, check_goes_back_to, describe, settle
from megatron_prune.checkpoint.digests import digest_file
from megatron_prune.checkpoint.manifest import Manifest
from megatron_prune.checkpoint.megatron_args import megatron_args, padded_as_stored
from megatron_prune.checkpoint.model_folder import TRACKER
from megatron_prune.checkpoint.options import TRANSFORMER_IMPLS
from megatron_prune.checkpoint.tensor_map import TensorMap
from megatron_prune.errors import CheckpointError
from megatron_prune.families.family import FAMILIES, family_for
from megatron_prune.files.documents import LIMIT, read_text, shorten

RELEASE, HF_FOLDER, PLAN_FILE = "release", "hf", "plan.json"
TOKENIZER = "tokenizer"
_FORMATS = {"torch_dist": torch_dist, "torch": legacy}


@dataclass
class MegatronCheckpoint:
    """An opened checkpoint.

    Attributes:
        path: its iteration directory.
        format: ``"torch_dist"`` or ``"torch"``.
        layout: the parallel layout it was written in.
        manifest: this project's; made up from what is said of it (``description.py``) for one of Megatron-LM or Bridge.
        own: whether this project wrote it.
        hf_folder: configuration and tokenizer for the way back: those named by the user, or kept in it; ``None``: there are none.
        unsaid: fields of its model that nobody says (only where it was opened as ``incomplete``).
        notes: what the user should know about how its model was settled.
    """

    path: Path
    format: str
    config: ModelConfig
    layout: ParallelLayout
    tensors: TensorMap
    manifest: Manifest
    own: bool
    hf_folder: Path | None
    unsaid: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()

    def plan_text(self) -> str | None:
        """The plan that it was pruned by, as it stands, if it was.

        Raises:
            CheckpointError: if it is a link, or no text.
        """
        file = self.path / PLAN_FILE
        if file.is_symlink():
            raise CheckpointError(f"{file}", got="a link", needed="the plan itself", do="put a copy in its place, or remove it")
        return read_text(file) if file.exists() else None

    def edited_files(self) -> list[str]:
        """Configuration, tokenizer and other files beside the weights that are not as they were written, or gone."""
        return edited_files(self.path, self.manifest)


def iteration_directory(path: Path) -> Path:
    """The directory that holds the checkpoint which ``path`` (a root or the directory itself) means.

    Raises:
        CheckpointError: if there is none, or the tracker names one that does not exist.
    """
    if torch_dist.is_torch_dist(path) or legacy.is_legacy(path):
        return path
    tracker = path / TRACKER
    if not tracker.is_file():
        if model_folder.is_huggingface(path):
            raise CheckpointError(
                f"{path} is not a Megatron checkpoint",
                got="a Hugging Face directory",
                do=f"make a checkpoint of it: megatron-prune convert --load {path} --save CHECKPOINT (as it is, it is taken by score, "
                "plan, prune-hf and evaluate)",
            )
        raise CheckpointError(
            f"{path} is not a Megatron checkpoint",
            got=f"no {TRACKER}" if path.is_dir() else "no such directory",
            needed="a checkpoint root, or one of its iteration directories",
        )
    text = read_text(tracker, limit=1 << 10).strip()
    if text != RELEASE and not re.fullmatch(r"[0-9]{1,18}", text):
        raise CheckpointError(f"{tracker}", got=shorten(text), needed="an iteration number, or 'release'")
    folder = path / (text if text == RELEASE else f"iter_{int(text):07d}")
    if not (torch_dist.is_torch_dist(folder) or legacy.is_legacy(folder)):
        raise CheckpointError(
            f"{tracker} names {folder.name}, which holds no checkpoint", do="restore it, or correct the tracker"
        )
    return folder


def open_checkpoint(path: Path, told: Told = Told(), *, incomplete: bool = False) -> MegatronCheckpoint:
    """Open a checkpoint of either format and check it against its own description.

    Args:
        told: what the user says beside it, for checkpoints of Megatron-LM and Bridge, whose arguments may not say all.
        incomplete: open such a one also where nobody says all of it, to be looked at and not to be computed with.

    Raises:
        CheckpointError: if it is incomplete, damaged, holds other tensors than it describes, or is not what ``told`` says.
    """
    folder = iteration_directory(path)
    name = "torch_dist" if torch_dist.is_torch_dist(folder) else "torch"
    if (folder / manifest.FILE).is_file():
        return _open_own(folder, name, told)
    if _written_by_us(folder):
        raise CheckpointError(f"{folder} has no {manifest.FILE}: its writing was never finished", do="make it again")
    room = _FORMATS[name]
    stored = room.read_stored(folder)
    said = describe(stored, folder, told.ignored) if stored is not None else Description()
    padded = said.padded_vocab or room.embedding_rows(folder)
    settled = settle(said, told, padded, folder, incomplete=incomplete)
    tensor, pipeline = room.found_layout(folder)
    layout = ParallelLayout(
        tensor=said.tensor or tensor, pipeline=said.pipeline or pipeline, vocab_divisible_by=said.vocab_divisible_by
    )
    layout = padded_as_stored(layout, settled.config.vocab_size, padded)
    return MegatronCheckpoint(
        path=folder,
        format=name,
        config=settled.config,
        layout=layout,
        tensors=room.open_map(folder, settled.config, layout),
        manifest=Manifest(family=(settled.family or family_for(settled.config)).name, model=settled.config, layout=layout),
        own=False,
        hf_folder=told.hf_dir or _tokenizer_beside(folder),
        unsaid=settled.unsaid,
        notes=settled.notes,
    )


def _open_own(folder: Path, name: str, told: Told) -> MegatronCheckpoint:
    described = Manifest.load(folder / manifest.FILE)
    if described.adapter:
        raise CheckpointError(
            f"{folder} holds an adapter, not a model",
            do="merge it into its model with megatron-prune transfer (or export), and name that",
        )
    config, layout, stored = described.model, described.layout, _FORMATS[name].read_stored(folder)
    if stored is None:
        raise CheckpointError(f"{folder} holds no args")
    said = describe(stored, folder).model
    differing = [f for f in SHAPE_FIELDS if f != "vocab_size" and said.get(f, getattr(config, f)) != getattr(config, f)]
    if differing:
        raise CheckpointError(f"{folder}: {manifest.FILE} and the stored args disagree on " + ", ".join(differing))
    check_flags(told, {name: getattr(config, name) for name in ("vocab_size", "rotary_base")})  # verbs check all of Megatron's
    if told.hf_dir:
        pruned = any(entry["step"] != "convert" for entry in described.recipe)
        check_goes_back_to(config, FAMILIES.get(described.family), told.hf_dir, pruned=pruned)
    kept = folder / HF_FOLDER
    tensors = _FORMATS[name].open_map(folder, config, layout).expect(described.digests, folder / manifest.FILE)
    check_structure(folder, described)
    if not described.digests and _holds_what_was_converted(described, tensors):
        tensors.content_id = described.content_id
    return MegatronCheckpoint(
        path=folder,
        format=name,
        config=config,
        layout=layout,
        tensors=tensors,
        manifest=described,
        own=True,
        hf_folder=told.hf_dir or (kept if kept.is_dir() else None),
    )


def _tokenizer_beside(folder: Path) -> Path | None:
    """Where Bridge keeps the tokenizer of a checkpoint."""
    return next((place for place in (folder / TOKENIZER, folder.parent / TOKENIZER) if place.is_dir()), None)


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
    transformer_impl: str = TRANSFORMER_IMPLS[0],
    tokenizer: bool = True,
    sizes: dict[tuple[str, int], list[int]] | None = None,
) -> Path:
    """Create an unfinished checkpoint with every tensor zero.

    Args:
        root: an existing empty directory (the partial output).
        final_root: where it will stand, for paths inside ``args``.
        dtypes: element type of every role tensor.
        tokenizer: whether one will lie in its ``hf`` folder.
        sizes: (axis, layer) → units of every rank, where shards are of unequal size.

    Returns:
        Its iteration directory. It becomes a checkpoint with :func:`finish`.
    """
    folder = root / RELEASE
    folder.mkdir()
    place = str(final_root.absolute() / RELEASE / HF_FOLDER) if tokenizer else None
    args: Namespace = megatron_args(config, layout, dtypes[EMBEDDING], place, transformer_impl)
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
    return [name for name, digest in recorded.items() if not _is_as_written(folder / name, digest)]


def _is_as_written(file: Path, digest: str) -> bool:
    return file.is_file() and file.stat().st_size <= LIMIT and digest_file(file) == digest  # no larger one was ever written


def _holds_weights(name: Path) -> bool:
    return name.suffix == ".distcp" or name.parts[0].startswith("mp_rank_")


def _is_structure(name: str) -> bool:
    """Whether a file says where the tensors lie and what they are; the others are for the way back."""
    return name in (torch_dist.METADATA, torch_dist.COMMON, torch_dist.VERSION_FILE)


def stored_dtypes(tensors: TensorMap) -> dict[TensorId, torch.dtype]:
    """Element type of every tensor of a map."""
    return {tensor: tensors.dtype(tensor) for tensor in tensor_ids(tensors.config)}
