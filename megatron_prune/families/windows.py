"""Sliding windows in ``config.json``: one in every layer, or none; these entries refuse what differs between layers."""

from __future__ import annotations

from typing import Any

from megatron_prune.arch.model import check_value
from megatron_prune.errors import CheckpointError
from megatron_prune.families.entries import Entries
from megatron_prune.files.documents import shorten

SLIDING, FULL = "sliding_attention", "full_attention"
_FULL = (FULL, "attention")
DEFAULT = 4096


def _none(hf: dict[str, Any]) -> dict[str, None]:
    check_types(hf, _FULL)
    return {"sliding_window": None}


def _one(hf: dict[str, Any]) -> dict[str, int | None]:
    """In tokens; ``layer_types`` may not say otherwise."""
    window = hf.get("sliding_window", DEFAULT)
    check_value("int | None", window, "config.json: sliding_window")
    check_types(hf, _FULL if window is None else (SLIDING,))
    return {"sliding_window": window}


def _some(hf: dict[str, Any]) -> dict[str, None]:
    """None, where all layers see all positions that the model has; else refused."""
    used = hf.get("use_sliding_window", False)
    check_value("bool", used, "config.json: use_sliding_window")
    window, first = hf.get("sliding_window", DEFAULT), hf.get("max_window_layers", 28)
    check_value("int | None", window, "config.json: sliding_window")
    if not isinstance(first, int) or isinstance(first, bool):
        raise CheckpointError("config.json: max_window_layers", got=shorten(first), needed="a whole number")
    check_types(hf, (*_FULL, SLIDING))
    window = window if used else None
    if hf.get("layer_types") is not None:
        sliding = hf["layer_types"].count(SLIDING)
    else:
        sliding = 0 if window is None else max(0, hf["num_hidden_layers"] - max(0, first))
    if sliding and (window is None or window < hf["max_position_embeddings"]):
        raise CheckpointError(
            "config.json: use_sliding_window",
            got=f"a window of {window} in {sliding} of {hf['num_hidden_layers']} layers",
            needed=f"full attention in every layer: use_sliding_window false, or at least {hf['max_position_embeddings']} tokens",
        )
    return {"sliding_window": None}


def check_types(hf: dict[str, Any], allowed: tuple[str, ...]) -> None:
    """Refuse ``layer_types`` of another length than the model, or with other words than these."""
    types = hf.get("layer_types")
    if types is None:
        return
    if not isinstance(types, list) or any(kind not in allowed for kind in types):
        raise CheckpointError("config.json: layer_types", got=shorten(types), needed=f"every layer {' or '.join(allowed)}")
    if len(types) != hf["num_hidden_layers"]:
        raise CheckpointError("config.json: layer_types", got=f"{len(types)} layers", needed=str(hf["num_hidden_layers"]))


def kept_types(types: Any, layers: int, kept: list[int] | None) -> Any:
    """``layer_types`` of the layers that remain."""
    if not isinstance(types, list) or len(types) == layers:
        return types
    if kept is not None and max(kept) < len(types):
        return [types[layer] for layer in kept]
    if len(set(map(str, types))) == 1:
        return types[:1] * layers
    raise CheckpointError(f"config.json lists {len(types)} layer_types of several kinds", needed=f"{layers}, one for each layer")


_FIELDS = ("sliding_window",)
NO_WINDOW = Entries(fields=_FIELDS, keys=("layer_types",), read=_none)
"""Of a family without: every layer sees all that came before."""

ONE_WINDOW = Entries(
    fields=_FIELDS,
    keys=("sliding_window", "layer_types"),
    read=_one,
    write=lambda config: {"sliding_window": config.sliding_window},
)
"""Of a family with the same window, or none, in every layer."""

WINDOWS_OF_SOME = Entries(
    fields=_FIELDS, keys=("sliding_window", "use_sliding_window", "max_window_layers", "layer_types"), read=_some
)
"""Of a family whose later layers may have one: carried where all of them amount to full attention."""
