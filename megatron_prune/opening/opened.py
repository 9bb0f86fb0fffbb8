"""A model as a verb is given it: a Hugging Face directory or a Megatron checkpoint, with its tokenizer, opened once."""

from __future__ import annotations

import functools
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from megatron_prune.arch.model import ModelConfig
from megatron_prune.arch.sharding import ParallelLayout
from megatron_prune.checkpoint import huggingface, megatron, model_folder
from megatron_prune.checkpoint.adapter import StoredAdapter, open_adapted
from megatron_prune.checkpoint.description import Told
from megatron_prune.checkpoint.hub_id import id_of_snapshot, id_said_by
from megatron_prune.checkpoint.huggingface import HuggingFaceModel
from megatron_prune.checkpoint.manifest import FILE, Manifest, Recipe
from megatron_prune.checkpoint.megatron import MegatronCheckpoint
from megatron_prune.checkpoint.stream import content_id
from megatron_prune.checkpoint.tensor_map import TensorMap
from megatron_prune.errors import InputError
from megatron_prune.families.family import FAMILIES, Family
from megatron_prune.files.documents import read_json, shorten
from megatron_prune.opening.foreign import ForeignOptions, told
from megatron_prune.opening.side_files import check_side_files
from megatron_prune.opening.source import Source, commonest, run
from megatron_prune.runtime.reporting import log
from megatron_prune.runtime.world import World


@dataclass(kw_only=True, eq=False)
class Opened:
    """A model of either kind, opened from its headers; or a tokenizer alone.

    Attributes:
        path: its directory: of a Megatron checkpoint that of the iteration.
        checkpoint: its files; ``None`` for a tokenizer alone.
        world: the processes of this run.
        named_tokenizer: what the user named as its tokenizer.
        adapter: what is merged into its weights as they are read, for a checkpoint of adapters.
    """

    path: Path
    checkpoint: HuggingFaceModel | MegatronCheckpoint | None
    world: World
    named_tokenizer: str | None = None
    adapter: StoredAdapter | None = None

    @property
    def config(self) -> ModelConfig | None:
        """Its sizes; ``None`` for a tokenizer alone."""
        return self.checkpoint.config if self.checkpoint else None

    @property
    def tensors(self) -> TensorMap:
        """Where its tensors lie."""
        return self.checkpoint.tensors

    @property
    def dtype(self) -> torch.dtype:
        """The element type of most tensors."""
        return commonest(Source(tensors=self.tensors).dtypes(self.config, None))

    @property
    def family(self) -> Family:
        """The Hugging Face family that it is of."""
        if isinstance(self.checkpoint, MegatronCheckpoint):
            return FAMILIES.get(self.checkpoint.manifest.family)
        return self.checkpoint.family

    @property
    def layout(self) -> ParallelLayout | None:
        """How a Megatron checkpoint is divided; ``None`` for what is not."""
        return self.checkpoint.layout if isinstance(self.checkpoint, MegatronCheckpoint) else None

    @property
    def recipe(self) -> list[dict[str, Any]]:
        """The steps that made it, oldest first."""
        return self._described.recipe

    @property
    def template(self) -> dict[str, Any] | None:
        """The ``config.json`` that it descends from, if it is kept."""
        kept = self.folder and model_folder.is_huggingface(self.folder)
        return model_folder.read_config(self.folder) if kept else None

    @property
    def base_model(self) -> str | None:
        """Id on the hub of the model that it descends from, as it was recorded, or as its directory says it; ``None``: unknown."""
        if self._described.base_model or self.folder is None:
            return self._described.base_model
        return id_of_snapshot(self.folder) or id_said_by(self.template or {})

    @property
    def folder(self) -> Path | None:
        """Directory of the configuration and the tokenizer that it keeps; ``None``: it keeps none."""
        return self.checkpoint.hf_folder if isinstance(self.checkpoint, MegatronCheckpoint) else self.path

    @functools.cached_property
    def tokenizer(self) -> Path | None:
        """Directory of the tokenizer that its text is read with: the one that was named, else its own.

        Raises:
            InputError: if what was named is no directory and no hub id.
        """
        return model_folder.resolve(self.named_tokenizer, weights=False) if self.named_tokenizer else self.folder

    @functools.cached_property
    def bos(self) -> int | None:
        """``bos_token_id`` of its configuration, or of one beside its tokenizer; ``None`` where these name none.

        Raises:
            CheckpointError: if its ``config.json`` is damaged.
        """
        for folder in filter(None, (self.folder, self.tokenizer)):
            config = folder / "config.json"
            value = read_json(config).get("bos_token_id") if config.exists() else None
            if type(value) is int:
                return value
        return None

    @property
    def leading(self) -> int | None:
        """The token that every sample of text begins with; ``None`` where its family does not need one.

        Raises:
            InputError: if it needs one, and neither its configuration nor its tokenizer says which.
        """
        if not self.family.needs_bos:
            return None
        found = self.bos if self.bos is not None or self.tokenizer is None else huggingface.tokenizer_bos(self.tokenizer)
        if found is None:
            raise InputError(
                f"{self.path}: text for a {self.family.name} model begins with its BOS token",
                got="no bos_token_id, and no tokenizer that names a bos_token",
                do="name a directory of its tokenizer with --tokenizer",
            )
        return found

    @property
    def rows(self) -> int | None:
        """Rows of the embedding; of a tokenizer alone what a ``config.json`` beside it says, if one does.

        Raises:
            InputError: if that is no number of rows.
        """
        if self.config is not None:
            return self.config.vocab_size
        rows = model_folder.read_config(self.path).get("vocab_size") if model_folder.is_huggingface(self.path) else None
        if rows is not None and (type(rows) is not int or rows < 1):
            raise InputError(f"{self.path}/config.json: vocab_size", got=shorten(rows), needed="a positive whole number")
        return rows

    def source(self) -> Source:
        """Its tensors as they are read."""
        return Source(tensors=self.tensors, transform=self.adapter.merge if self.adapter else None)

    @property
    def recorded_identity(self) -> str | None:
        """The content id that its manifest, or the recipe beside it, says."""
        return self._described.content_id

    @functools.cached_property
    def _described(self) -> Manifest | Recipe:
        """What lies beside its weights: how it came to be."""
        return self.checkpoint.manifest if isinstance(self.checkpoint, MegatronCheckpoint) else Recipe.load(self.path)

    @functools.cached_property
    def identity(self) -> str:
        """Its content id; where none is recorded, every process takes part when it is first asked for: the tensors are read.

        Raises:
            CheckpointError: if a tensor is not what was written.
        """
        return self.recorded_identity or self._digest(label="digesting", strict=False)

    def check_values(self) -> None:
        """Read all tensors before long work, and refuse values that are not sound; every process takes part.

        Raises:
            CheckpointError: naming the tensors.
        """
        digest = self._digest(label="checking", strict=True)
        self.identity = self.recorded_identity or digest

    def _digest(self, *, label: str, strict: bool) -> str:
        return content_id(run(self.world, Source(tensors=self.tensors), None, label=label, strict=strict).digests)

    def say_notes(self) -> None:
        """Say how the model of a Megatron checkpoint was settled, and what beside its weights was edited."""
        if not isinstance(self.checkpoint, MegatronCheckpoint):
            return
        if self.folder == self.path / megatron.HF_FOLDER:
            check_side_files(self.world, self.path, self.checkpoint.manifest)
        for note in self.checkpoint.notes if self.world.is_main else ():
            log.warning("%s: %s", self.path, note)


def open_megatron(
    path: str, world: World, options: ForeignOptions, *, tokenizer: str | None = None, flags: dict[str, Any] | None = None
) -> Opened:
    """The Megatron checkpoint that a verb is about; what is worth knowing of it is said.

    Args:
        options: what is said beside it.
        tokenizer: named by the user.
        flags: Megatron's own, where a verb takes them.

    Raises:
        CheckpointError: if it is none, or not whole.
    """
    checkpoint = megatron.open_checkpoint(Path(path), told(options, flags))
    model = Opened(path=checkpoint.path, checkpoint=checkpoint, world=world, named_tokenizer=tokenizer)
    model.say_notes()
    return model


def open_merged(path: str, base: str | None, world: World, options: ForeignOptions) -> Opened:
    """The same; a checkpoint of adapters is opened as the model that they were trained on, and they are merged as it is read.

    Args:
        base: where that model is now, if not where it was.

    Raises:
        CheckpointError: also if that model is not found, or is another one.
    """
    checkpoint, adapter = open_adapted(Path(path), Path(base) if base else None, told(options))
    model = Opened(path=checkpoint.path, checkpoint=checkpoint, world=world, adapter=adapter)
    model.say_notes()
    return model


def open_huggingface(folder: Path, world: World) -> Opened:
    """The model in a Hugging Face directory.

    Raises:
        CheckpointError: if it is none, or not whole.
    """
    return Opened(path=folder, checkpoint=huggingface.open_model(folder), world=world)


def open_to_run(name: str, world: World, options: ForeignOptions, *, tokenizer: str | None = None) -> Opened:
    """A model of either kind, to be run.

    Args:
        options: what is said beside a Megatron checkpoint.
        tokenizer: named by the user.

    Raises:
        InputError: if it is none, or not whole, or something is said of what it is not.
    """
    path = Path(os.path.expanduser(name))
    if path.exists() and not model_folder.is_huggingface(path):
        return open_megatron(str(path), world, options, tokenizer=tokenizer)
    if told(options) != Told():
        raise InputError(f"{name} is no Megatron checkpoint", do="leave out what is said of one: --hf-dir and the like")
    model = open_huggingface(model_folder.resolve(name), world)
    model.named_tokenizer = tokenizer
    return model


def open_either(name: str, world: World, beside: Told) -> Opened:
    """A model of either kind, to be looked at: what a Megatron checkpoint leaves open may stay open.

    Args:
        beside: what is said of a Megatron checkpoint.

    Raises:
        CheckpointError: if it is none, or not whole.
    """
    path = Path(name)
    if path.is_dir() and not model_folder.is_huggingface(path):
        checkpoint = megatron.open_checkpoint(path, beside, incomplete=True)
        return Opened(path=checkpoint.path, checkpoint=checkpoint, world=world)
    return open_huggingface(model_folder.resolve(name), world)


def open_with_vocabulary(name: str, world: World, *, tokenizer: str | None = None, beside: Told = Told()) -> Opened:
    """A model of either kind whose tokens are asked about, or a tokenizer alone.

    Args:
        tokenizer: named by the user, for a model that keeps none.
        beside: what is said of a Megatron checkpoint.

    Raises:
        InputError: if there is none, or something is said of what it is not.
    """
    path = Path(os.path.expanduser(name))
    if model_folder.is_megatron(path):
        checkpoint = megatron.open_checkpoint(path, beside)
        return Opened(path=checkpoint.path, checkpoint=checkpoint, world=world, named_tokenizer=tokenizer)
    if beside != Told():
        raise InputError(f"{name} is no Megatron checkpoint", do="leave out what is said of one: --hf-dir and the like")
    folder = model_folder.resolve(name)
    if any(folder.glob("*.safetensors")) or any(folder.glob("*.bin")):
        return Opened(path=folder, checkpoint=huggingface.open_model(folder), world=world, named_tokenizer=tokenizer)
    if tokenizer:
        raise InputError(f"--tokenizer beside {name}", got="a tokenizer already", do="leave it out")
    return Opened(path=folder, checkpoint=None, world=world)


def open_tokenizer(name: str, world: World) -> Path:
    """Directory of the tokenizer that a name means, be it what a Megatron checkpoint keeps; no weights are looked at.

    Raises:
        InputError: if it means none.
    """
    path = Path(os.path.expanduser(name))
    if not (path / megatron.TRACKER).is_file() and not (path / megatron.HF_FOLDER).is_dir():
        return model_folder.resolve(name, weights=False)
    folder = megatron.iteration_directory(path) / megatron.HF_FOLDER
    if not folder.is_dir():
        raise InputError(f"{path} keeps no tokenizer", do="name its Hugging Face directory with --tokenizer")
    if (folder.parent / FILE).is_file():
        check_side_files(world, folder.parent, Manifest.load(folder.parent / FILE))
    return folder
