"""Sliding windows in ``config.json``: one in every layer, or none; what differs between layers is refused."""

from __future__ import annotations

from typing import Any

from megatron_prune.arch.model import check_value
from megatron_prune.errors import CheckpointError
from megatron_prune.files.documents import shorten

SLIDING = "sliding_attention"
_FULL = ("full_attention", "attention")
DEFAULT = 4096


def no_window(hf: dict[str, Any]) -> None:
    """Of a family without: every layer sees all that came before."""
    _check_types(hf, _FULL)


def one_window(hf: dict[str, Any]) -> int | None:
    """Of a family with the same window, or none, in every layer: in tokens.

    Raises:
        CheckpointError: if ``layer_types`` says otherwise, or it is no size.
    """
    window = hf.get("sliding_window", DEFAULT)
    check_value("int | None", window, "config.json: sliding_window")
    _check_types(hf, _FULL if window is None else (SLIDING,))
    return window


def windows_of_some(hf: dict[str, Any]) -> None:
    """Of a family whose later layers may have one: none, where all of them amount to full attention.

    Raises:
        CheckpointError: if a layer sees less than all positions that the model has.
    """
    used = hf.get("use_sliding_window", False)
    check_value("bool", used, "config.json: use_sliding_window")
    window, first = hf.get("sliding_window", DEFAULT), hf.get("max_window_layers", 28)
    check_value("int | None", window, "config.json: sliding_window")
    if not isinstance(first, int) or isinstance(first, bool):
        raise CheckpointError("config.json: max_window_layers", got=shorten(first), needed="a whole number")
    _check_types(hf, (*_FULL, SLIDING))
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


def _check_types(hf: dict[str, Any], allowed: tuple[str, ...]) -> None:
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
