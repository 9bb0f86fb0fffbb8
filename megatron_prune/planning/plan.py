"""The plan: which units stay, in which order, on which rank. A JSON file that a person can read and edit."""

from __future__ import annotations

import json
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field

from megatron_prune.arch.blocks.block import BLOCKS
from megatron_prune.arch.model import FIELDS, PER_LAYER, SHAPE_FIELDS, ModelConfig
from megatron_prune.axes.axis import layer_axes
from megatron_prune.errors import PlanError
from megatron_prune.files.documents import STRICT, parse_versioned, read_bytes, shorten
from megatron_prune.planning.layer_sizes import halves

FORMAT, VERSION = "megatron-prune plan", 2
ALL, ROTATED, NONE = "all", "rotated", "none"


@dataclass(frozen=True, kw_only=True)
class LayerPlan:
    """One layer that stays. Units are ids of the model before pruning, in their new order; ``None`` keeps them all.

    Attributes:
        layer: its 0-based number before pruning.
        ffn, kv_head, head: kept units; none at all of a block that goes alone. ``head`` lists query heads, grouped as
            ``kv_head`` lists their groups.
        shards: axis → kept units of every tensor-parallel rank, only where these differ (``unbalance``).
    """

    layer: int
    ffn: list[int] | None = None
    kv_head: list[int] | None = None
    head: list[int] | None = None
    shards: dict[str, list[int]] = field(default_factory=dict)

    def units(self, axis: str) -> list[int] | None:
        """Kept units of an axis that is chosen by layer."""
        return getattr(self, axis)


@dataclass(frozen=True, kw_only=True, repr=False)
class Plan:
    """Attributes:
    old, new: the sizes in :data:`SHAPE_FIELDS` before and after: a number, or a list of one for each layer where these differ.
    hidden: kept channels of the residual stream, ``None`` for all.
    rotated: the stream is rotated before it is cut (``surgery/basis.py``), so that no channel stays as it was; the
        rotation comes from the calibration text, not from the plan.
    untied: the head of a tied model becomes a matrix of its own.
    vocab: kept tokens, ascending, ``None`` for all; which may go is for the tokenizer to say (``vocabulary/trimmed.py``).
    layers: the layers that stay, ascending.
    tokenizer: digest of the tokenizer that says what these tokens are; ``None`` fits any. Version 1 of the file keeps it in
        ``made_by``.
    made_by: a record of how it was made (metric, prune_type, seed, parallel sizes …); nothing follows from it.
    content_id: digest of the model it was made from; ``None`` fits any model of the old shape.
    """

    old: Shape
    new: Shape
    hidden: list[int] | None
    layers: list[LayerPlan]
    rotated: bool = False
    untied: bool = False
    vocab: list[int] | None = None
    tokenizer: str | None = None
    made_by: dict[str, Any] = field(default_factory=dict)
    content_id: str | None = None

    def dumps(self) -> str:
        """The file's text: one line per list of units."""
        keep = lambda units: ALL if units is None else units
        layers = []
        for entry in self.layers:
            gone = {half: axes for half, axes in halves().items() if all(entry.units(axis) == [] for axis in axes)}
            there = [axis for axis in layer_axes() if not any(axis in axes for axes in gone.values())]
            body = {"layer": entry.layer, **dict.fromkeys(gone, NONE), **{axis: keep(entry.units(axis)) for axis in there}}
            layers.append({**body, **({"shards": entry.shards} if entry.shards else {})})
        head = {
            "format": FORMAT,
            "version": VERSION,
            "made_by": self.record(),
            "content_id": self.content_id,
            "old": self.old,
            "new": self.new,
            "hidden": ROTATED if self.rotated else keep(self.hidden),
            **({"untied": True} if self.untied else {}),
            **({"vocab": self.vocab} if self.vocab is not None else {}),
        }
        lines = [f"  {json.dumps(key)}: {json.dumps(value)}" for key, value in head.items()]
        rows = []
        for body in layers:
            inner = [f"      {json.dumps(key)}: {json.dumps(value)}" for key, value in body.items()]
            rows.append("    {\n" + ",\n".join(inner) + "\n    }")
        lines.append('  "layers": [\n' + ",\n".join(rows) + "\n  ]")
        return "{\n" + ",\n".join(lines) + "\n}\n"

    @classmethod
    def loads(cls, text: str | bytes, where: object) -> Plan:
        """Read a plan file.

        Raises:
            PlanError: if it is not a plan, of another version, or has unknown or missing keys.
        """
        held = parse_versioned(text, _PlanFile, where, format=FORMAT, version=VERSION, error=PlanError)
        if len({len(counts) for entry in held.layers for counts in entry.shards.values()}) > 1:
            raise PlanError(f"{where}: shards are of different numbers of ranks")
        for key, shape in (("old", held.old), ("new", held.new)):
            if shape is not None and set(shape) != set(SHAPE_FIELDS):
                raise PlanError(f"{where}: {key}", got=shorten(list(shape)), needed="exactly " + ", ".join(SHAPE_FIELDS))
            several = [name for name, size in (shape or {}).items() if isinstance(size, list) and name not in PER_LAYER]
            if several:
                raise PlanError(f"{where}: {key}: {several[0]}", got=shorten(shape[several[0]]), needed="one number")
        units = lambda value: None if value == ALL else value
        rotated = held.hidden == ROTATED
        layers = [entry.read(where) for entry in held.layers]
        new = held.new
        if new is None:
            if rotated:
                raise PlanError(f"{where} rotates the stream and does not say how wide it becomes", needed='"new"')
            new = sizes_after(held.old, units(held.hidden), layers, units(held.vocab))
        return cls(
            old=held.old,
            new=new,
            hidden=None if rotated else units(held.hidden),
            layers=layers,
            rotated=rotated,
            untied=held.untied,
            vocab=units(held.vocab),
            tokenizer=_tokenizer(held.made_by),
            made_by=held.made_by,
            content_id=held.content_id,
        )

    def size(self, axis: str, number: int) -> int:
        """Units of an axis in layer ``number`` of those that stay; of a list that is too short none."""
        size = self.new[FIELDS[axis]]
        return size if isinstance(size, int) else size[number] if number < len(size) else 0

    def shard_sizes(self) -> dict[tuple[str, int], list[int]]:
        """(axis, new layer number) → kept units of every rank, where these differ."""
        return {(axis, new): counts for new, entry in enumerate(self.layers) for axis, counts in entry.shards.items()}

    def record(self) -> dict[str, Any]:
        """How it was made, as its file and recipes say it."""
        return self.made_by if self.tokenizer is None else {**self.made_by, "vocab": self.vocab_record()}

    def vocab_record(self) -> dict[str, Any]:
        """How its tokens were chosen, as its file says it."""
        chosen = _vocab_record(self.made_by)
        return chosen if self.tokenizer is None else {**chosen, "tokenizer": self.tokenizer}

    def recipe_entry(self) -> dict[str, Any]:
        """What a manifest's recipe says of this cut."""
        untied = {"untied": True} if self.untied else {}
        return {**self.record(), "step": "prune", "old": self.old, "new": self.new, **untied}

    def without_shards(self) -> Plan:
        """The same cut dealt evenly (one rank holds everything anyway)."""
        return replace(self, layers=[replace(entry, shards={}) for entry in self.layers])

    def with_tokens_of(self, other: Plan | None) -> Plan:
        """The same cut of everything else, with the tokens that stay in another plan (``None``: all)."""
        if other is None or other.vocab is None:
            return replace(self, vocab=None, tokenizer=None, new={**self.new, "vocab_size": self.old["vocab_size"]})
        new = {**self.new, "vocab_size": len(other.vocab)}
        return replace(self, vocab=other.vocab, tokenizer=other.tokenizer, new=new)

    def __repr__(self) -> str:
        return f"<Plan: {self.summary()}>"

    def summary(self) -> str:
        """The sizes that change, for a person."""
        shown = {name: (shown_size(self.old[name]), shown_size(self.new[name])) for name in SHAPE_FIELDS}
        changes = [f"{name} {old} → {new}" for name, (old, new) in shown.items() if self.old[name] != self.new[name]]
        return ", ".join(changes + (["head untied"] if self.untied else [])) or "nothing changed"

    def new_config(self, config: ModelConfig) -> ModelConfig:
        """``config`` (the model's before pruning) with the layers that stay and the sizes after it."""
        kept = config.of_layers([entry.layer for entry in self.layers])
        sizes = {name: tuple(value) if isinstance(value, list) else value for name, value in self.new.items()}
        blocks = tuple(kind for kind in kept.blocks if not _is_empty(sizes[FIELDS[BLOCKS.get(kind).axes[0]]]))
        return replace(kept, **sizes, blocks=blocks, tie_embeddings=config.tie_embeddings and not self.untied)


def _vocab_record(made_by: dict[str, Any]) -> dict[str, Any]:
    found = made_by.get("vocab", {})
    return found if isinstance(found, dict) else {}


def _tokenizer(made_by: dict[str, Any]) -> str | None:
    """Where version 1 keeps it."""
    found = _vocab_record(made_by)
    return str(found["tokenizer"]) if "tokenizer" in found else None


def _is_empty(size: int | tuple[int, ...]) -> bool:
    return not any(size) if isinstance(size, tuple) else size == 0


def shown_size(size: int | list[int]) -> str:
    """A size, or those of the layers."""
    return str(size) if isinstance(size, int) else f"{min(size)} to {max(size)} by layer (mean {sum(size) / len(size):.1f})"


def sizes_after(old: Shape, hidden: list[int] | None, layers: list[LayerPlan], vocab: list[int] | None) -> Shape:
    """What is left of ``old``: numbers follow from the lists."""
    new = {**old, "num_layers": len(layers)}
    new |= {} if hidden is None else {"hidden_size": len(hidden)}
    new |= {} if vocab is None else {"vocab_size": len(vocab)}
    for axis in layer_axes():
        before, counts = old[FIELDS[axis]], []
        for entry in layers:
            whole = before if isinstance(before, int) else before[entry.layer] if entry.layer < len(before) else 0
            units = entry.units(axis)
            counts.append(whole if units is None else len(units))
        new[FIELDS[axis]] = counts[0] if len(set(counts)) == 1 else counts
    return new


Shape = dict[str, int | list[int]]
Units = list[int] | Literal["all"]
Size = Annotated[int, Field(ge=0)]
Sizes = dict[str, Size | list[Size]]


@dataclass(frozen=True, kw_only=True)
class _LayerEntry:
    """One layer as the file says it: see :class:`LayerPlan`. A block that goes alone is ``"none"``, and its axes are left out."""

    layer: int
    ffn: Units | None = None
    kv_head: Units | None = None
    head: Units | None = None
    attention: Literal["none"] | None = None
    mlp: Literal["none"] | None = None
    shards: dict[str, list[int]] = field(default_factory=dict)

    def read(self, where: object) -> LayerPlan:
        """The layer.

        Raises:
            PlanError: if it does not say what stays along an axis, or says two things.
        """
        found, gone = {}, {axis for half, axes in halves().items() if getattr(self, half) == NONE for axis in axes}
        for axis in layer_axes():
            units = getattr(self, axis)
            if (units is None) != (axis in gone):
                got = "nothing" if units is None else f"units, and a block that is {NONE}"
                raise PlanError(f"{where}: layer {self.layer}: {axis}", got=got, needed=f'a list of units, or "{ALL}"')
            found[axis] = [] if axis in gone else None if units == ALL else units
        return LayerPlan(layer=self.layer, shards=self.shards, **found)


@dataclass(frozen=True, kw_only=True)
class _PlanFile:
    """The file: see :class:`Plan`."""

    __pydantic_config__ = STRICT

    made_by: dict[str, Any]
    content_id: str | None = None
    old: Sizes
    new: Sizes | None = None
    hidden: list[int] | Literal["all", "rotated"]
    layers: list[_LayerEntry]
    untied: bool = False
    vocab: Units = ALL


def load_plan(path: Path) -> Plan:
    """Read a plan file.

    Raises:
        PlanError: if it cannot be read or is not a plan.
    """
    return Plan.loads(read_bytes(path, error=PlanError), path)


def shape_of(config: ModelConfig) -> dict[str, int | list[int]]:
    """A model's sizes as files say them: a number, or a list of one for each layer where these differ."""
    sizes = {name: getattr(config, name) for name in SHAPE_FIELDS}
    return {name: list(value) if isinstance(value, tuple) else value for name, value in sizes.items()}


def whole_plan(config: ModelConfig, made_by: dict[str, Any], content_id: str | None) -> Plan:
    """The plan that changes nothing: what a cut of the vocabulary alone starts from."""
    layers = [LayerPlan(layer=layer) for layer in range(config.num_layers)]
    shape = shape_of(config)
    return Plan(old=shape, new=shape, hidden=None, layers=layers, made_by=made_by, content_id=content_id)
