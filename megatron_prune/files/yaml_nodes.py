"""YAML from outside as nodes that are looked at, never built: no tag makes an object, no alias is unfolded."""

from __future__ import annotations

from typing import Any

import yaml

from megatron_prune.errors import CheckpointError, InputError, reason


def compose(text: str, where: object, *, error: type[InputError] = CheckpointError) -> yaml.Node | None:
    """The root node of a document; ``None`` of an empty one.

    Raises:
        InputError (of the kind ``error``): if it is not YAML.
    """
    try:
        return yaml.compose(text, Loader=yaml.CSafeLoader)
    except (yaml.YAMLError, RecursionError, ValueError) as found:
        raise error(f"{where} is not YAML", got=reason(found)) from None


def entries(node: Any) -> dict[str, yaml.Node]:
    """Those of a mapping by their names; none of anything else."""
    pairs = node.value if isinstance(node, yaml.MappingNode) else []
    return {key.value: value for key, value in pairs if isinstance(key, yaml.ScalarNode)}


_SCALARS = frozenset(f"tag:yaml.org,2002:{kind}" for kind in ("str", "int", "float", "bool", "null", "timestamp"))


def texts(node: yaml.Node) -> str | list[str] | None:
    """A text, or those of a list, as they stand (``no`` is Norwegian, not false), nulls left out; ``None`` for anything else."""
    listed = node.tag == "tag:yaml.org,2002:seq"
    parts = node.value if listed else [node]
    if not all(isinstance(part, yaml.ScalarNode) and part.tag in _SCALARS for part in parts):
        return None
    found = [part.value for part in parts if part.tag != "tag:yaml.org,2002:null"]
    return found if listed else "".join(found)
