"""Rotary positions in ``config.json``: read as transformers 5 reads them, written so that transformers 4 reads the same."""

from __future__ import annotations

from typing import Any

from megatron_prune.arch.model import RopeScaling, check_value
from megatron_prune.errors import CheckpointError
from megatron_prune.families.entries import Entries
from megatron_prune.files.documents import shorten

DEFAULT_BASE = 10000.0

_LLAMA3 = ("factor", "low_freq_factor", "high_freq_factor")


def _read(hf: dict[str, Any]) -> dict[str, Any]:
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
    # As transformers 5: a key beside the object wins, and without any the model's own length counts.
    length = rope.get("original_max_position_embeddings", hf.get("max_position_embeddings"))
    length = hf.get("original_max_position_embeddings", length)
    part = rope.get("partial_rotary_factor", hf.get("partial_rotary_factor"))
    check_base(base, part)
    return {"rotary_base": float(base), "rope_scaling": read_scaling(rope, name, length)}


def check_base(base: Any, part: Any, name: str = "rope_theta") -> None:
    """Refuse a base that is no number, or a head that rotates in part."""
    check_value("float", base, f"config.json: {name}")
    if part not in (None, 1, 1.0) or isinstance(part, bool):
        raise CheckpointError("config.json: partial_rotary_factor", got=shorten(part), needed="1.0: the whole head rotates")


def read_scaling(rope: dict[str, Any], name: str, length: Any) -> RopeScaling | None:
    """The scaling that an entry says.

    Args:
        name: of the entry, for messages.
        length: the context that ``llama3`` counts from.
    """
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind == "default" and not any(isinstance(value, dict) for value in rope.values()):
        return None
    if kind == "linear":
        return RopeScaling(kind="linear", factor=_number(rope, "factor", name))
    if kind == "llama3":
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


def scaling_entry(scaling: RopeScaling | None) -> dict[str, Any] | None:
    """``rope_scaling``, with both names of the kind."""
    if scaling is None:
        return None
    entry: dict[str, Any] = {"rope_type": scaling.kind, "type": scaling.kind, "factor": scaling.factor}
    if scaling.kind == "llama3":
        names = ("low_freq_factor", "high_freq_factor", "original_max_position_embeddings")
        entry |= {name: getattr(scaling, name) for name in names}
    return entry


def parameters_entry(base: float, scaling: RopeScaling | None) -> dict[str, Any]:
    """The same, and the base, as an entry of transformers 5's ``rope_parameters``."""
    entry = scaling_entry(scaling) or {"rope_type": "default"}
    entry.pop("type", None)
    return {**entry, "rope_theta": base}


ROTARY = Entries(
    fields=("rotary_base", "rope_scaling"),
    keys=("rope_parameters", "rope_scaling", "rope_theta", "original_max_position_embeddings", "partial_rotary_factor"),
    read=_read,
    write=lambda config: {"rope_theta": config.rotary_base, "rope_scaling": scaling_entry(config.rope_scaling)},
    renamed=lambda config: {"rope_parameters": parameters_entry(config.rotary_base, config.rope_scaling)},
)
"""One base and one scaling for all layers."""
