"""Sizes named layer by layer: ``--drop-attention``, ``--drop-mlp`` and the file of ``--layer-sizes``."""

from __future__ import annotations

from dataclasses import dataclass, fields
from difflib import get_close_matches
from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field

from megatron_prune.arch.blocks.block import BLOCKS
from megatron_prune.arch.model import FIELDS, ModelConfig
from megatron_prune.axes.axis import AXES
from megatron_prune.errors import InputError, raise_all
from megatron_prune.files.documents import STRICT, read_json

Sizes = dict[tuple[str, int], int]
"""(axis, layer before pruning) → units that stay; 0 drops the block."""

_Size = Annotated[int, Field(ge=1)] | None
_DO = 'write sizes by layer so: {"3": {"ffn_hidden_size": 800, "num_query_groups": 2}, "5": {"mlp": "none"}}'


@dataclass(frozen=True, kw_only=True)
class _LayerSizes:
    """What stays of a layer, as the file says it: see :data:`FIELDS`."""

    __pydantic_config__ = STRICT

    ffn_hidden_size: _Size = None
    num_query_groups: _Size = None
    num_attention_heads: _Size = None
    attention: Literal["none"] | None = None
    mlp: Literal["none"] | None = None


def read_layer_sizes(path: Path) -> Sizes:
    """The file of ``--layer-sizes``: layer before pruning → sizes in Megatron's names, or ``"none"`` for a block that goes.

    Raises:
        InputError: if it is not such a file, or says two things of a block.
    """
    _check_fields(path)
    found: Sizes = {}
    for word, entry in read_json(path, dict[str, _LayerSizes], error=InputError, do=_DO, once=True).items():
        if len(word) > 6 or not word.isdecimal() or str(int(word)) != word:
            raise InputError(f"{path}", got=f"{word[:20]!r}", needed='numbers of layers, such as "3"', do=_DO)
        layer, said = int(word), {axis: getattr(entry, field) for axis, field in FIELDS.items() if hasattr(entry, field)}
        for half, axes in halves().items():
            gone = getattr(entry, half) == "none"
            if gone and any(said[axis] for axis in axes):
                raise InputError(f"{path}: layer {layer}", got=f'sizes of a block, and "{half}": "none"', needed="one of the two")
            found |= {(axis, layer): 0 if gone else said[axis] for axis in axes if gone or said[axis]}
    if not found:
        raise InputError(f"{path} names no size", do=_DO)
    return found


def _check_fields(path: Path) -> None:
    known = [item.name for item in fields(_LayerSizes)]
    for word, entry in read_json(path, error=InputError, do=_DO).items():
        if isinstance(entry, dict) and (unknown := [name for name in entry if name not in known]):
            near = get_close_matches(unknown[0], known, n=1)
            meant = f"; did you mean {near[0]!r}?" if near else ""
            what = f"{path}: layer {word[:20]}: there is no field {unknown[0][:40]!r}{meant}"
            raise InputError(what, needed="some of " + ", ".join(known))


def dropped(layers: tuple[int, ...] | None, half: str, flag: str) -> Sizes:
    """The blocks of one half that go alone, from these layers.

    Raises:
        InputError: if a layer stands twice.
    """
    twice = sorted({layer for layer in layers or () if layers.count(layer) > 1})
    raise_all(InputError, flag, [f"layer {layer} stands twice" for layer in twice])
    return {(axis, layer): 0 for layer in layers or () for axis in halves()[half]}


def halves() -> dict[str, tuple[str, ...]]:
    """Half of a layer → the axes that its block is cut along."""
    kinds = [BLOCKS.get(name) for name in BLOCKS.names()]
    return {kind.half: kind.axes for kind in kinds}


def completed(sizes: Sizes, config: ModelConfig, gone: tuple[int, ...]) -> Sizes:
    """``sizes`` with what follows from them: KV groups take their query heads along.

    Args:
        config: of the model before pruning.
        gone: layers that go.

    Raises:
        InputError: naming every layer that is not there or goes, and every size that is too large or does not divide.
    """
    found, problems = dict(sizes), []
    for axis, layer in sizes:
        if not 0 <= layer < config.num_layers:
            problems.append(f"layer {layer}: needed 0 to {config.num_layers - 1}")
        elif layer in gone:
            problems.append(f"layer {layer} goes, and has a size of its own")
        elif not (whole := AXES.get(axis).count(config.of_layer(layer))):
            problems.append(f"layer {layer} has no {next(half for half, axes in halves().items() if axis in axes)}")
        elif sizes[axis, layer] > whole:
            problems.append(f"layer {layer}: {FIELDS[axis]} {sizes[axis, layer]} is larger than the layer's {whole}")
    raise_all(InputError, "the sizes by layer do not fit the model", sorted(set(problems)))
    for layer in sorted({layer for axis, layer in sizes if axis in ("head", "kv_head")}):
        old = config.of_layer(layer)
        heads, groups = sizes.get(("head", layer)), sizes.get(("kv_head", layer))
        if both := (0, 0) if groups == 0 else paired(old, heads, groups):
            found["head", layer], found["kv_head", layer] = both
        else:
            inside = f" in {groups} KV groups" if groups else ""
            per = f"1 to {old.heads_per_group} query heads in each KV group"
            problems.append(f"layer {layer}: {heads} heads{inside}; needed {per}, the same in all")
    raise_all(InputError, "the sizes by layer do not fit the model", problems)
    return found


def paired(config: ModelConfig, heads: int | None, groups: int | None) -> tuple[int, int] | None:
    """Query heads and KV groups that a request for one of them, or both, comes to; ``None`` where groups cannot keep one number.

    Query heads alone: cut inside every KV group where they divide over the groups, else by whole groups. KV groups alone: each
    takes its query heads along.

    Args:
        config: of the layer, which has attention.
    """
    each, whole = config.heads_per_group, config.units("kv_head")
    if heads is None:
        groups = groups or whole
        return groups * each, groups
    if groups is None:
        groups = whole if heads % whole == 0 else heads // each if heads % each == 0 else 0
    return (heads, groups) if groups and heads % groups == 0 and heads // groups <= each and groups <= whole else None
