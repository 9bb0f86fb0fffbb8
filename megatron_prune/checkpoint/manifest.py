"""``megatron_prune.json``: what a Megatron checkpoint of this project holds and how it came to be.

A pruned Hugging Face directory says how it came to be in ``megatron_prune_recipe.json``.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from megatron_prune.arch.model import ModelConfig
from megatron_prune.arch.sharding import ParallelLayout
from megatron_prune.errors import CheckpointError
from megatron_prune.files.documents import STRICT, parse_json, read_json, shorten

FILE = "megatron_prune.json"
VERSION = 2
"""1 had no digests of tensors and files, and called the layout "parallel"."""
_FORMAT = "megatron-prune checkpoint"


RECIPE_FILE = "megatron_prune_recipe.json"
"""In a pruned Hugging Face directory: how it came to be, and the digests of its weights."""


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """Content of :data:`RECIPE_FILE`.

    Attributes:
        recipe: steps that made the directory, oldest first.
        digests: str(tensor) → digests of its stored bytes (``checkpoint/digests.py``).
    """

    format: str = "megatron-prune recipe"
    version: int = VERSION
    recipe: list[dict[str, Any]] = field(default_factory=list)
    digests: dict[str, str] = field(default_factory=dict)

    def dumps(self) -> str:
        """The file's text."""
        return json.dumps(asdict(self), indent=2) + "\n"

    @classmethod
    def load(cls, folder: Path) -> Recipe:
        """That of a Hugging Face directory; an empty one if it does not say.

        Raises:
            CheckpointError: if the file is damaged.
        """
        path = folder / RECIPE_FILE
        if not path.exists():
            return cls()
        found = read_json(path, cls, do="mend or remove it")
        unnamed = [entry for entry in found.recipe if not isinstance(entry.get("step"), str)]
        if unnamed:
            raise CheckpointError(f"{path}: recipe", got=shorten(unnamed[0]), needed="entries with a step", do="mend or remove it")
        return found


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """The last file written into a checkpoint; without it a directory of this project is not a checkpoint.

    Attributes:
        family: Hugging Face ``model_type`` the model came from and returns to.
        content_id: digest of the model's role tensors when it was first converted or last pruned
            (``stream.content_id``); later changes of format, layout or dtype keep it. Plans refer to it.
        hf_dtypes: ``{"default": dtype, str(tensor): dtype, …}`` of the Hugging Face checkpoint.
        tied_head_stored: the Hugging Face checkpoint stored a copy of the tied output layer.
        kept_layers: the original layers that remain, ``None`` if none were dropped.
        recipe: one entry per step that made the checkpoint, oldest first.
        adapter: in a checkpoint of adapters alone: their ``config``, and the ``base`` they belong on with its
            ``base_content_id``.
        digests: str(tensor) → digests of its bytes as they lie in this checkpoint's files (``checkpoint/digests.py``).
        files: digests of all other files, by their path in the checkpoint.
    """

    __pydantic_config__ = STRICT

    family: str
    model: ModelConfig
    layout: ParallelLayout
    content_id: str | None = None
    hf_dtypes: dict[str, str] = field(default_factory=dict)
    tied_head_stored: bool = False
    kept_layers: list[int] | None = None
    recipe: list[dict[str, Any]] = field(default_factory=list)
    adapter: dict[str, Any] | None = None
    digests: dict[str, str] = field(default_factory=dict)
    files: dict[str, str] = field(default_factory=dict)

    def dumps(self) -> str:
        """The file's text."""
        return json.dumps({"format": _FORMAT, "version": VERSION, **asdict(self)}, indent=2) + "\n"

    @classmethod
    def load(cls, path: Path) -> Manifest:
        """Read the file.

        Raises:
            CheckpointError: if it is not such a file, or of a later version.
        """
        head = read_json(path)
        if head.pop("format", None) != _FORMAT:
            raise CheckpointError(f"{path} is not a manifest of this project", needed=f"format {_FORMAT!r}")
        version = head.pop("version", None)
        if version not in range(1, VERSION + 1):
            got = f"version {shorten(version)}"
            raise CheckpointError(f"{path}", got=got, needed=f"version {VERSION}", do="update megatron-prune")
        if version == 1:
            head["layout"] = head.pop("parallel", None)
        return parse_json(json.dumps(head), cls, path)
