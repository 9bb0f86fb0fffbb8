"""Local layers, which see a window and rotate by a base of their own, among global ones, which see everything."""

from __future__ import annotations

from typing import Any

from megatron_prune.arch.model import ModelConfig, check_value
from megatron_prune.errors import CheckpointError
from megatron_prune.families.entries import Entries
from megatron_prune.families.rope import check_base, parameters_entry, read_scaling, scaling_entry
from megatron_prune.families.windows import FULL, SLIDING, check_types
from megatron_prune.files.documents import shorten

_BASES = {SLIDING: "rope_local_base_freq", FULL: "rope_theta"}
"""Kind of layer → the key of its rotary base in transformers 4."""

DEFAULTS = {"sliding_window": 4096, "sliding_window_pattern": 6, "rope_local_base_freq": 1e4, "rope_theta": 1e6}
"""What transformers takes for keys that are left out, and what is written of a kind that no layer is of."""


def _read(hf: dict[str, Any]) -> dict[str, Any]:
    """Window, base and scaling of every layer.

    ``rope_parameters`` says bases by kind, and a key of transformers 4 one that it leaves out; ``rope_scaling`` is of global
    layers, and wins over what ``rope_parameters`` says of them.
    """
    check_value("int", hf["sliding_window"], "config.json: sliding_window")
    types, entries = _types(hf), _rope(hf)
    found = {}
    for kind, key in _BASES.items():
        base = entries[kind]["rope_theta"] if "rope_theta" in entries[kind] else hf[key]
        check_base(base, entries[kind].get("partial_rotary_factor", hf.get("partial_rotary_factor")), key)
        length = entries[kind].get("original_max_position_embeddings", hf["max_position_embeddings"])
        scaling = read_scaling(entries[kind], "rope_scaling" if hf.get("rope_scaling") else "rope_parameters", length)
        found[kind] = {"sliding_window": None if kind == FULL else hf["sliding_window"], "rotary_base": float(base)}
        found[kind]["rope_scaling"] = scaling
    if found[SLIDING]["rope_scaling"] is not None:
        raise CheckpointError(
            "config.json: rope_parameters: sliding_attention", got=shorten(entries[SLIDING]), needed="rope_type default"
        )
    return {name: tuple(found[kind][name] for kind in types) for name in found[FULL]}


def _types(hf: dict[str, Any]) -> list[str]:
    """The kind of every layer."""
    if hf.get("layer_types") is not None:
        check_types(hf, (SLIDING, FULL))
        return hf["layer_types"]
    every = hf["sliding_window_pattern"]
    check_value("int", every, "config.json: sliding_window_pattern")
    return [FULL if (layer + 1) % every == 0 else SLIDING for layer in range(hf["num_hidden_layers"])]


def _rope(hf: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Kind → what is said of its rotary positions."""
    given, scaling = hf.get("rope_parameters") or {}, hf.get("rope_scaling") or {}
    for name, value in (("rope_parameters", given), ("rope_scaling", scaling)):
        if not isinstance(value, dict):
            raise CheckpointError(f"config.json: {name}", got=shorten(value), needed="a JSON object, or null")
    if not set(given) <= set(_BASES) or not all(isinstance(entry, (dict, type(None))) for entry in given.values()):
        raise CheckpointError(
            "config.json: rope_parameters", got=shorten(given), needed=f"an entry for each kind of layer: {', '.join(_BASES)}"
        )
    if "type" in scaling and "rope_type" not in scaling:
        raise CheckpointError(
            "config.json: rope_scaling",
            got="a type without a rope_type, which transformers 5 passes over in this family",
            do=f"if this model scales its positions, write rope_type {shorten(scaling['type'])} too; else write null",
        )
    if any(isinstance(value, dict) for value in scaling.values()):
        raise CheckpointError("config.json: rope_scaling", got=shorten(scaling), needed="the scaling of global layers alone")
    return {SLIDING: given.get(SLIDING) or {}, FULL: {**(given.get(FULL) or {}), **scaling}}


def _kinds(config: ModelConfig) -> tuple[list[str], dict[str, ModelConfig]]:
    """The kind of every layer, and the first layer of each kind that there is."""
    layers = [config.of_layer(layer) for layer in range(config.num_layers)]
    types = [SLIDING if layer.sliding_window else FULL for layer in layers]
    return types, {kind: layers[types.index(kind)] for kind in set(types)}


def _base(kinds: dict[str, ModelConfig], kind: str) -> float:
    return kinds[kind].rotary_base if kind in kinds else DEFAULTS[_BASES[kind]]


def _write(config: ModelConfig) -> dict[str, Any]:
    """``layer_types`` are always written: no pattern says what is left when layers have gone."""
    types, kinds = _kinds(config)
    return {
        "layer_types": types,
        "sliding_window": kinds[SLIDING].sliding_window if SLIDING in kinds else DEFAULTS["sliding_window"],
        **{key: _base(kinds, kind) for kind, key in _BASES.items()},
        "rope_scaling": scaling_entry(kinds[FULL].rope_scaling) if FULL in kinds else None,
    }


def _renamed(config: ModelConfig) -> dict[str, Any]:
    _, kinds = _kinds(config)
    scaling = {kind: kinds[kind].rope_scaling if kind in kinds else None for kind in _BASES}
    return {"rope_parameters": {kind: parameters_entry(_base(kinds, kind), scaling[kind]) for kind in _BASES}}


LOCAL_AND_GLOBAL = Entries(
    fields=("sliding_window", "rotary_base", "rope_scaling"),
    keys=(
        *("layer_types", "sliding_window", "sliding_window_pattern", "rope_parameters", "rope_scaling"),
        *_BASES.values(),
        *("original_max_position_embeddings", "partial_rotary_factor"),
    ),
    read=_read,
    write=_write,
    renamed=_renamed,
    by_layer=True,
)
