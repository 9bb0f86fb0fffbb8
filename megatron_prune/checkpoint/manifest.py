"""``megatron_prune.json``: what a Megatron checkpoint of this project holds and how it came to be.

A pruned Hugging Face directory says how it came to be in ``megatron_prune_recipe.json``.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path, PurePath
from typing import Annotated, Any, Literal

from pydantic import Field
from typing_extensions import NotRequired, TypedDict

from megatron_prune.arch.adapter import AdapterConfig
from megatron_prune.arch.model import ModelConfig
from megatron_prune.arch.sharding import ParallelLayout
from megatron_prune.errors import CheckpointError
from megatron_prune.files.documents import STRICT, parse_versioned, read_bytes

FILE = "megatron_prune.json"
VERSION = 4
"""1 had no digests of tensors and files, 2 did not say which model of the hub it was made from, 3 had no content id in a recipe."""
_FORMAT, _RECIPE = "megatron-prune checkpoint", "megatron-prune recipe"

RECIPE_FILE = "megatron_prune_recipe.json"
"""In a pruned Hugging Face directory: how it came to be, and the digests of its weights."""


class RecipeEntry(TypedDict):
    """A step that made a model: its name, the sizes that it changed, and whatever else it says."""

    __pydantic_config__ = {"extra": "allow"}
    step: str
    old: NotRequired[dict[str, int | list[int]]]
    new: NotRequired[dict[str, int | list[int]]]


def is_changed(recipe: list[RecipeEntry]) -> bool:
    """Whether a step of a recipe made another model of what was converted."""
    return any(entry["step"] not in ("convert", "transfer") for entry in recipe)


def without_places(said: Any) -> Any:
    """What a recipe says, without the folders of this machine: of an absolute path its last name."""
    if isinstance(said, dict):
        return {key: without_places(value) for key, value in said.items()}
    if isinstance(said, (list, tuple)):
        return [without_places(value) for value in said]
    return PurePath(said).name if isinstance(said, str) and PurePath(said).is_absolute() else said


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """Content of :data:`RECIPE_FILE`.

    Attributes:
        recipe: steps that made the directory, oldest first.
        digests: str(tensor) → digests of its stored bytes (``checkpoint/digests.py``).
        base_model, content_id: as in :class:`Manifest`.
    """

    __pydantic_config__ = STRICT

    recipe: list[RecipeEntry] = field(default_factory=list)
    digests: dict[str, str] = field(default_factory=dict)
    base_model: str | None = None
    content_id: str | None = None

    def dumps(self) -> str:
        """The file's text."""
        return json.dumps({"format": _RECIPE, "version": VERSION, **asdict(self)}, indent=2) + "\n"

    @classmethod
    def load(cls, folder: Path) -> Recipe:
        """That of a Hugging Face directory; an empty one if it does not say.

        Raises:
            CheckpointError: if the file is damaged.
        """
        file = folder / RECIPE_FILE
        if not file.exists():
            return cls()
        return parse_versioned(read_bytes(file), cls, file, format=_RECIPE, version=VERSION, do="mend or remove it")


@dataclass(frozen=True, kw_only=True)
class AdapterOrigin:
    """What a checkpoint of adapters alone holds: their config, and the model they belong on by its place and digest."""

    __pydantic_config__ = STRICT
    config: AdapterConfig
    base: str
    base_content_id: str | None


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """The last file written into a checkpoint; without it a directory of this project is not a checkpoint.

    Attributes:
        family: Hugging Face ``model_type`` the model came from and returns to.
        content_id: digest of the model's role tensors when it was first converted, or last pruned or trained
            (``stream.content_id``); later changes of format, layout or dtype keep it, an export too. Plans refer to it.
        hf_dtypes: ``{"default": dtype, str(tensor): dtype, …}`` of the Hugging Face checkpoint.
        tied_head_stored: the Hugging Face checkpoint stored a copy of the tied output layer.
        kept_layers: the original layers that remain, ``None`` if none were dropped.
        recipe: one entry per step that made the checkpoint, oldest first.
        adapter: in a checkpoint of adapters alone: their ``config``, and the ``base`` they belong on with its
            ``base_content_id``.
        digests: str(tensor) → digests of its bytes as they lie in this checkpoint's files (``checkpoint/digests.py``).
        files: digests of all other files, by their path in the checkpoint.
        base_model: id on the hub of the model that it descends from, where that is known.
        converted_from: the Hugging Face directory that was converted last, as an absolute path.
    """

    __pydantic_config__ = STRICT

    family: str
    model: ModelConfig
    layout: Annotated[ParallelLayout, Field(alias="parallel")]
    content_id: str | None = None
    hf_dtypes: dict[str, Literal["float64", "float32", "float16", "bfloat16"]] = field(default_factory=dict)
    tied_head_stored: bool = False
    kept_layers: list[Annotated[int, Field(ge=0)]] | None = None
    recipe: list[RecipeEntry] = field(default_factory=list)
    adapter: AdapterOrigin | None = None
    digests: dict[str, str] = field(default_factory=dict)
    files: dict[str, str] = field(default_factory=dict)
    base_model: str | None = None
    converted_from: str | None = None

    def dumps(self) -> str:
        """The file's text."""
        data = {"parallel" if name == "layout" else name: value for name, value in asdict(self).items()}
        return json.dumps({"format": _FORMAT, "version": VERSION, **data}, indent=2) + "\n"

    @classmethod
    def load(cls, path: Path) -> Manifest:
        """Read the file.

        Raises:
            CheckpointError: if it is not such a file, of a later version, or says of the model what cannot be.
        """
        found = parse_versioned(read_bytes(path), cls, path, format=_FORMAT, version=VERSION)
        if found.hf_dtypes and "default" not in found.hf_dtypes:
            raise CheckpointError(f"{path}: hf_dtypes.default", needed="the element type of most tensors")
        if found.kept_layers is not None and len(found.kept_layers) != found.model.num_layers:
            raise CheckpointError(
                f"{path}: kept_layers", got=f"{len(found.kept_layers)} layers", needed=f"the model's {found.model.num_layers}"
            )
        return found
