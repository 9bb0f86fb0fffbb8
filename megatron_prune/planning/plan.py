"""The plan: which units stay, in which order, on which rank. A JSON file that a person can read and edit."""

from __future__ import annotations

import json
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field

from megatron_prune.arch.model import SHAPE_FIELDS, ModelConfig
from megatron_prune.errors import PlanError, raise_all
from megatron_prune.files.documents import STRICT, parse_versioned, read_bytes, shorten
from megatron_prune.planning.selection import Scores, keep_heads, keep_layers, keep_units, shard_counts
from megatron_prune.planning.target import Target

FORMAT, VERSION = "megatron-prune plan", 1
ALL, ROTATED = "all", "rotated"
_LAYER_AXES = {"ffn": "ffn_hidden_size", "kv_head": "num_query_groups", "head": "num_attention_heads"}


@dataclass(frozen=True, kw_only=True)
class LayerPlan:
    """One layer that stays. Units are ids of the model before pruning, in their new order; ``None`` keeps them all.

    Attributes:
        layer: its 0-based number before pruning.
        ffn, kv_head, head: kept units. ``head`` lists query heads, grouped as ``kv_head`` lists their groups.
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


@dataclass(frozen=True, kw_only=True)
class Plan:
    """Attributes:
    old, new: the sizes in :data:`SHAPE_FIELDS` before and after.
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

    old: dict[str, int]
    new: dict[str, int]
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
            body = {"layer": entry.layer, **{axis: keep(getattr(entry, axis)) for axis in _LAYER_AXES}}
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
            if set(shape) != set(SHAPE_FIELDS):
                raise PlanError(f"{where}: {key}", got=shorten(list(shape)), needed="exactly " + ", ".join(SHAPE_FIELDS))
        units = lambda value: None if value == ALL else value
        rotated = held.hidden == ROTATED
        layers = [
            LayerPlan(
                layer=entry.layer,
                ffn=units(entry.ffn),
                kv_head=units(entry.kv_head),
                head=units(entry.head),
                shards=entry.shards,
            )
            for entry in held.layers
        ]
        return cls(
            old=held.old,
            new=held.new,
            hidden=None if rotated else units(held.hidden),
            layers=layers,
            rotated=rotated,
            untied=held.untied,
            vocab=units(held.vocab),
            tokenizer=_tokenizer(held.made_by),
            made_by=held.made_by,
            content_id=held.content_id,
        )

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

    def summary(self) -> str:
        """The sizes that change, for a person."""
        changes = [f"{name} {self.old[name]} → {self.new[name]}" for name in SHAPE_FIELDS if self.old[name] != self.new[name]]
        return ", ".join(changes + (["head untied"] if self.untied else [])) or "nothing changed"

    def new_config(self, config: ModelConfig) -> ModelConfig:
        """``config`` (the model's before pruning) with the layers that stay and the sizes after it."""
        kept = config.of_layers([entry.layer for entry in self.layers])
        return replace(kept, **self.new, tie_embeddings=config.tie_embeddings and not self.untied)


def _vocab_record(made_by: dict[str, Any]) -> dict[str, Any]:
    found = made_by.get("vocab", {})
    return found if isinstance(found, dict) else {}


def _tokenizer(made_by: dict[str, Any]) -> str | None:
    """Where version 1 keeps it."""
    found = _vocab_record(made_by)
    return str(found["tokenizer"]) if "tokenizer" in found else None


Units = list[int] | Literal["all"]
Sizes = dict[str, Annotated[int, Field(ge=1)]]


@dataclass(frozen=True, kw_only=True)
class _LayerEntry:
    """One layer as the file says it: see :class:`LayerPlan`."""

    layer: int
    ffn: Units
    kv_head: Units
    head: Units
    shards: dict[str, list[int]] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class _PlanFile:
    """The file: see :class:`Plan`."""

    __pydantic_config__ = STRICT

    made_by: dict[str, Any]
    content_id: str | None = None
    old: Sizes
    new: Sizes
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


def shape_of(config: ModelConfig) -> dict[str, int]:
    """The sizes that a plan records."""
    return {name: getattr(config, name) for name in SHAPE_FIELDS}


def make_plan(
    config: ModelConfig,
    target: Target,
    scores: Scores,
    *,
    prune_type: str,
    ranks: int,
    made_by: dict[str, Any],
    content_id: str | None,
    rotate: bool = False,
) -> Plan:
    """Choose units by their scores.

    Args:
        scores: for every pair of :func:`selection.needed_scores`; ``("block", n)`` instead of ``("layer", None)`` where
            the n layers that go are one block.
        ranks: tensor-parallel ranks that hold the model.
        rotate: cut hidden units are rotated first; they need no scores.
    """
    new = target.config
    choose = lambda axis, layer, keep: keep_units(axis, scores[axis, layer], keep, config.of_layer(layer), ranks, prune_type)
    rotated = rotate and new.hidden_size != config.hidden_size
    hidden = choose("hidden", None, new.hidden_size) if new.hidden_size != config.hidden_size and not rotated else None
    if target.drop_layers is None:
        kept = keep_layers(scores, config.num_layers, new.num_layers)
    else:
        kept = [layer for layer in range(config.num_layers) if layer not in target.drop_layers]
    layers = []
    for layer in kept:
        ffn = kv_head = head = None
        shards: dict[str, list[int]] = {}
        if new.units("ffn") != config.units("ffn"):
            ffn = choose("ffn", layer, new.units("ffn"))
        groups = list(range(config.units("kv_head")))
        if new.units("kv_head") != config.units("kv_head"):
            groups = kv_head = choose("kv_head", layer, new.units("kv_head"))
        if new.heads_per_group != config.heads_per_group:
            head = keep_heads(scores["head", layer], groups, new.heads_per_group, config)
        elif kv_head is not None:
            n = config.heads_per_group
            head = [group * n + position for group in kv_head for position in range(n)]
        if prune_type == "unbalance":
            for axis, units in (("ffn", ffn), ("kv_head", kv_head)):
                if units is not None:
                    shards[axis] = shard_counts(axis, units, config, ranks)
        layers.append(LayerPlan(layer=layer, ffn=ffn, kv_head=kv_head, head=head, shards=shards))
    return Plan(
        old=shape_of(config),
        new=shape_of(new),
        hidden=hidden,
        rotated=rotated,
        untied=config.tie_embeddings and not new.tie_embeddings,
        layers=layers,
        made_by=made_by,
        content_id=content_id,
    )


def whole_plan(config: ModelConfig, made_by: dict[str, Any], content_id: str | None) -> Plan:
    """The plan that changes nothing: what a cut of the vocabulary alone starts from."""
    layers = [LayerPlan(layer=layer) for layer in range(config.num_layers)]
    shape = shape_of(config)
    return Plan(old=shape, new=shape, hidden=None, layers=layers, made_by=made_by, content_id=content_id)


def check_plan(plan: Plan, config: ModelConfig, where: object) -> None:
    """Refuse a plan that does not fit a model of shape ``config``.

    Raises:
        PlanError: naming everything that does not fit.
    """
    problems = []
    for name, value in shape_of(config).items():
        if plan.old.get(name) != value:
            problems.append(f"it was made for {name} {plan.old.get(name)}, the checkpoint has {value}")
    raise_all(PlanError, f"{where} does not fit the checkpoint", problems)
    new = plan.new
    if new["kv_channels"] != config.kv_channels:
        problems.append("kv_channels cannot change")
    problems += _vocab_problems(plan, config)
    if plan.untied and not config.tie_embeddings:
        problems.append("it makes the head a matrix of its own, which it is already")
    if plan.rotated and not 0 < new["hidden_size"] < config.hidden_size:
        problems.append(f"it rotates the stream and keeps {new['hidden_size']} channels of {config.hidden_size}")
    if not plan.rotated:
        problems += _unit_problems("hidden", plan.hidden, config.hidden_size, new["hidden_size"])
    numbers = [entry.layer for entry in plan.layers]
    problems += _unit_problems("layers", numbers, config.num_layers, new["num_layers"])
    if numbers != sorted(numbers):
        problems.append("layers must stand in ascending order")
    for entry in plan.layers:
        for axis, size in _LAYER_AXES.items():
            units = getattr(entry, axis)
            problems += _unit_problems(f"layer {entry.layer}: {axis}", units, getattr(config, size), new[size])
        problems += _head_problems(entry, config, new)
        problems += _shard_problems(entry, new)
    raise_all(PlanError, f"{where} does not fit the checkpoint", problems)
    plan.new_config(config)


def kept_tokens(plan: Plan, config: ModelConfig, where: object) -> list[int]:
    """The vocabulary of a plan, for any model with as many tokens as the one that it was made for.

    Raises:
        PlanError: if it does not fit the model, or keeps them all.
    """
    if plan.vocab is None:
        raise PlanError(f"{where} keeps the whole vocabulary", do="make one with megatron-prune vocab select")
    problems = []
    if plan.old["vocab_size"] != config.vocab_size:
        problems.append(f"it was made for vocab_size {plan.old['vocab_size']}, the checkpoint has {config.vocab_size}")
    problems += _vocab_problems(plan, config)
    raise_all(PlanError, f"{where} does not fit the checkpoint", problems)
    return plan.vocab


def _vocab_problems(plan: Plan, config: ModelConfig) -> list[str]:
    ascending = plan.vocab is None or plan.vocab == sorted(plan.vocab)
    problems = _unit_problems("vocab", plan.vocab, config.vocab_size, plan.new["vocab_size"])
    return problems + ([] if ascending else ["vocab must stand in ascending order"])


def _unit_problems(what: str, units: list[int] | None, count: int, keep: int) -> list[str]:
    if units is None:
        return [] if count == keep else [f'{what}: "{ALL}" keeps {count} units, the new shape says {keep}']
    problems = []
    if len(units) != keep:
        problems.append(f"{what}: {len(units)} units, the new shape says {keep}")
    outside = [unit for unit in units if not 0 <= unit < count]
    if outside:
        problems.append(f"{what}: {outside[:5]} out of range 0 to {count - 1}")
    if len(set(units)) != len(units):
        problems.append(f"{what}: a unit stands twice")
    return problems


def _head_problems(entry: LayerPlan, config: ModelConfig, new: dict[str, int]) -> list[str]:
    if new["num_attention_heads"] % new["num_query_groups"]:
        return [f"{new['num_attention_heads']} heads do not divide over {new['num_query_groups']} KV groups"]
    per_group = new["num_attention_heads"] // new["num_query_groups"]
    heads = entry.head if entry.head is not None else list(range(config.units("head")))
    groups = entry.kv_head if entry.kv_head is not None else list(range(config.units("kv_head")))
    expected = [group for group in groups for _ in range(per_group)]
    if [head // config.heads_per_group for head in heads] != expected:
        return [f"layer {entry.layer}: head must list {per_group} query heads of each KV group in kv_head, in that order"]
    return []


def _shard_problems(entry: LayerPlan, new: dict[str, int]) -> list[str]:
    problems = []
    for axis, counts in entry.shards.items():
        if axis not in ("ffn", "kv_head"):
            problems.append(f"layer {entry.layer}: shards of {axis}: only ffn and kv_head have shards")
        elif min(counts, default=-1) < 0 or sum(counts) != new[_LAYER_AXES[axis]]:
            problems.append(f"layer {entry.layer}: shards of {axis} {counts} do not add up to {new[_LAYER_AXES[axis]]}")
    return problems
