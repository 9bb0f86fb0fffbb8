"""A way in which ``config.json`` says layers that have sizes of their own, and the code of ours that a form wants beside it."""

from __future__ import annotations

import functools
from collections import Counter
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Callable

from megatron_prune.arch.model import ModelConfig
from megatron_prune.errors import CheckpointError
from megatron_prune.files.documents import shorten

SIZES = ("ffn_hidden_size", "num_attention_heads", "num_query_groups")
"""Fields of :class:`ModelConfig` that a form says layer by layer."""


@dataclass(frozen=True)
class Refused:
    """Why a family cannot say a model: the parts of an :class:`InputError`."""

    what: str
    got: object = None
    needed: str | None = None


@dataclass(frozen=True, kw_only=True)
class Form:
    """One form.

    Attributes:
        name: as ``--target-family`` says it (:func:`megatron_prune.families.choice.choose_family`).
        said_in: whether a ``config.json`` is of the form.
        plain: the ``config.json`` that a stock class of transformers would have if layers were alike; refuses what the form
            does not mean, or what would not be carried, with :class:`CheckpointError`.
        sizes: ``config.json``, and the model that :attr:`plain` means → :data:`SIZES` of every layer.
        unsaid: what of a model it cannot say, in words; ``""`` if it can.
        write: the plain ``config.json`` of :func:`commonest`, and a model → that of the form.
        whole: whether a ``config.json`` that means a model says everything that a program needs to load it.
    """

    name: str
    said_in: Callable[[dict[str, Any]], bool]
    plain: Callable[[dict[str, Any]], dict[str, Any]]
    sizes: Callable[[dict[str, Any], ModelConfig], dict[str, tuple[int, ...]]]
    unsaid: Callable[[ModelConfig], str]
    write: Callable[[dict[str, Any], ModelConfig], dict[str, Any]]
    whole: Callable[[dict[str, Any]], bool]


def is_plain(config: ModelConfig) -> bool:
    """Whether a stock class can have the shape: layers are alike, and have attention and a feed-forward block."""
    return config.is_uniform and all(getattr(config, field) for field in SIZES)


def commonest(config: ModelConfig) -> ModelConfig:
    """The same model with layers that are alike, of the sizes that most of its layers have."""
    heads = Counter(pair for layer in range(config.num_layers) if (pair := attention_of(config.of_layer(layer)))[0])
    widths = Counter(width for layer in range(config.num_layers) if (width := config.of_layer(layer).ffn_hidden_size))
    (heads, groups), width = (count.most_common(1)[0][0] if count else one for count, one in ((heads, (1, 1)), (widths, 1)))
    sizes = dict(zip(SIZES, (width, heads, groups)))
    return replace(config, **sizes, blocks=ModelConfig.__dataclass_fields__["blocks"].default)


def attention_of(layer: ModelConfig) -> tuple[int, int]:
    """Query heads and KV groups of a layer."""
    return layer.num_attention_heads, layer.num_query_groups


def differences(config: ModelConfig) -> str:
    """What is not alike in all layers, in words, with the layers' numbers."""
    layers = [config.of_layer(layer) for layer in range(config.num_layers)]
    found = []
    for field, block in (("num_attention_heads", "attention"), ("ffn_hidden_size", "feed-forward block")):
        if without := [layer for layer, sizes in enumerate(layers) if not getattr(sizes, field)]:
            found.append(f"no {block} in {_layers(without)}")
    usual = commonest(config)
    for field in SIZES:
        wanted = getattr(usual, field)
        if others := [(layer, size) for layer, sizes in enumerate(layers) if (size := getattr(sizes, field)) not in (0, wanted)]:
            named = ", ".join(f"{size} in layer {layer}" for layer, size in others[:8]) + _more(others)
            found.append(f"{field} {wanted}, but {named}")
    return "; ".join(found)


def _layers(numbers: list[int]) -> str:
    return ("layer " if len(numbers) == 1 else "layers ") + ", ".join(map(str, numbers[:8])) + _more(numbers)


def _more(items: list) -> str:
    return f" and {len(items) - 8} more" if len(items) > 8 else ""


# ------------------------------------------------------------------------------------------------------------ code of ours

_SHIPPED = Path(__file__).parent / "shipped"


@functools.cache
def shipped_files() -> dict[str, bytes]:
    """Name → content of every file that may leave with a model."""
    return {path.name: path.read_bytes() for path in sorted(_SHIPPED.glob("*.py")) if not path.name.startswith("_")}


def code_of(hf: dict[str, Any]) -> dict[str, bytes]:
    """Files of ours that a ``config.json`` names in its ``auto_map``, by name."""
    named = hf.get("auto_map")
    modules = {str(value).partition(".")[0] for value in named.values()} if isinstance(named, dict) else set()
    return {name: content for name, content in shipped_files().items() if name.removesuffix(".py") in modules}


def check_code(hf: dict[str, Any], folder: Path) -> None:
    """Refuse a folder whose ``config.json`` names code of ours, and whose file of that name is another.

    Raises:
        CheckpointError: naming the file.
    """
    for name, content in code_of(hf).items():
        file = folder / name
        if not file.is_file() or file.stat().st_size != len(content) or file.read_bytes() != content:
            raise CheckpointError(
                "config.json: the model wants code of its own, which is never run",
                got=f"auto_map {shorten(hf['auto_map'])}, and a {name} that is " + ("another" if file.is_file() else "missing"),
                needed=f"the {name} that this version of megatron-prune writes",
                do=f"put that file in its place, if {folder} was written by it; else take auto_map out of config.json",
            )
