"""``megatron_prune.json``: what a Megatron checkpoint of this project holds and how it came to be."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from megatron_prune.arch.model import ModelConfig
from megatron_prune.arch.sharding import ParallelLayout
from megatron_prune.errors import CheckpointError

FILE = "megatron_prune.json"
VERSION = 1
_FORMAT = "megatron-prune checkpoint"


RECIPE_FILE = "megatron_prune_recipe.json"
"""In a pruned Hugging Face directory: how it came to be."""


def dump_recipe(recipe: list[dict[str, Any]]) -> str:
    """Text of :data:`RECIPE_FILE`."""
    return json.dumps({"format": "megatron-prune recipe", "version": VERSION, "recipe": recipe}, indent=2) + "\n"


def read_recipe(folder: Path) -> list[dict[str, Any]]:
    """Steps that made a Hugging Face directory, oldest first; empty if it does not say."""
    try:
        recipe = json.loads((folder / RECIPE_FILE).read_text(encoding="utf-8"))["recipe"]
        return [entry for entry in recipe if isinstance(entry, dict) and "step" in entry]
    except FileNotFoundError:
        return []
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{folder / RECIPE_FILE} is damaged", got=repr(error), do="mend or remove it") from None


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
    """

    family: str
    model: ModelConfig
    layout: ParallelLayout
    content_id: str | None = None
    hf_dtypes: dict[str, str] = field(default_factory=dict)
    tied_head_stored: bool = False
    kept_layers: list[int] | None = None
    recipe: list[dict[str, Any]] = field(default_factory=list)
    adapter: dict[str, Any] | None = None

    def dumps(self) -> str:
        """The file's text."""
        data = {
            "format": _FORMAT,
            "version": VERSION,
            "family": self.family,
            "model": self.model.to_json(),
            "parallel": {
                "tensor": self.layout.tensor,
                "pipeline": self.layout.pipeline,
                "vocab_divisible_by": self.layout.vocab_divisible_by,
            },
            "content_id": self.content_id,
            "hf_dtypes": self.hf_dtypes,
            "tied_head_stored": self.tied_head_stored,
            "kept_layers": self.kept_layers,
            "recipe": self.recipe,
            "adapter": self.adapter,
        }
        return json.dumps(data, indent=2) + "\n"

    @classmethod
    def load(cls, path: Path) -> Manifest:
        """Read the file.

        Raises:
            CheckpointError: if it is not such a file, or of a later version.
        """
        try:
            data = json.loads(path.read_text(encoding="utf-8"))
            if data.pop("format") != _FORMAT:
                raise ValueError("another format")
            version = data.pop("version")
            if version != VERSION:
                raise CheckpointError(
                    f"{path}", got=f"version {version}", needed=f"version {VERSION}", do="update megatron-prune"
                )
            model = ModelConfig.from_json(data.pop("model"))
            return cls(model=model, layout=ParallelLayout(**data.pop("parallel")), **data)
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise CheckpointError(f"{path} is not a manifest of this project", got=str(error)) from None
