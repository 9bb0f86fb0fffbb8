"""Rotary positions in ``config.json``: read as transformers 5 reads them, written so that transformers 4 reads the same."""

from __future__ import annotations

from typing import Any

from megatron_prune.arch.model import RopeScaling, check_value
from megatron_prune.errors import CheckpointError
from megatron_prune.files.documents import shorten

DEFAULT_BASE = 10000.0

_LLAMA3 = ("factor", "low_freq_factor", "high_freq_factor")


def read_rope(hf: dict[str, Any]) -> tuple[float, RopeScaling | None]:
    """Rotary base and scaling.

    transformers 5 takes ``rope_scaling`` where it says anything, else ``rope_parameters``; a base that the one it takes does
    not name is ``rope_theta`` beside it, never that of the other.

    Raises:
        CheckpointError: on a scaling that is not carried, or a value that none has.
    """
    name = "rope_scaling" if hf.get("rope_scaling") else "rope_parameters"
    rope = hf.get(name) or {}
    if not isinstance(rope, dict):
        raise CheckpointError(f"config.json: {name}", got=shorten(rope), needed="a JSON object, or null")
    base = rope["rope_theta"] if "rope_theta" in rope else hf.get("rope_theta", DEFAULT_BASE)
    check_value("float", base, "config.json: rope_theta")
    part = rope.get("partial_rotary_factor", hf.get("partial_rotary_factor"))
    if part not in (None, 1, 1.0) or isinstance(part, bool):
        raise CheckpointError("config.json: partial_rotary_factor", got=shorten(part), needed="1.0: the whole head rotates")
    return float(base), _scaling(rope, name, hf)


def _scaling(rope: dict[str, Any], name: str, hf: dict[str, Any]) -> RopeScaling | None:
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind == "default" and not any(isinstance(value, dict) for value in rope.values()):
        return None
    if kind == "linear":
        return RopeScaling(kind="linear", factor=_number(rope, "factor", name))
    if kind == "llama3":
        # As transformers 5: a key beside the object wins, and without any the model's own length counts.
        length = rope.get("original_max_position_embeddings", hf.get("max_position_embeddings"))
        length = hf.get("original_max_position_embeddings", length)
        length = int(length) if isinstance(length, float) and length.is_integer() else length
        check_value("int", length, f"config.json: {name}: original_max_position_embeddings")
        numbers = {key: _number(rope, key, name) for key in _LLAMA3}
        return RopeScaling(kind="llama3", **numbers, original_max_position_embeddings=length)
    got = "positions that differ between layers" if kind == "default" else shorten(kind)
    raise CheckpointError(f"config.json: {name}", got=got, needed="default, linear or llama3, the same in every layer")


def _number(rope: dict[str, Any], key: str, name: str) -> float:
    value = rope.get(key)
    check_value("float", value, f"config.json: {name}: {key}")
    return float(value)


def rope_entries(base: float, scaling: RopeScaling | None) -> dict[str, Any]:
    """``rope_theta`` and ``rope_scaling``, which every version of transformers reads, with both names of the kind."""
    if scaling is None:
        return {"rope_theta": base, "rope_scaling": None}
    entry: dict[str, Any] = {"rope_type": scaling.kind, "type": scaling.kind, "factor": scaling.factor}
    if scaling.kind == "llama3":
        names = ("low_freq_factor", "high_freq_factor", "original_max_position_embeddings")
        entry |= {name: getattr(scaling, name) for name in names}
    return {"rope_theta": base, "rope_scaling": entry}


def rope_parameters(base: float, scaling: RopeScaling | None) -> dict[str, Any]:
    """The same as transformers 5 writes it."""
    entry = dict(rope_entries(base, scaling)["rope_scaling"] or {"rope_type": "default"})
    entry.pop("type", None)
    return {**entry, "rope_theta": base}
