"""What keys of ``config.json`` say together, in both directions: where one field of ours is not one key of theirs."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Callable

from megatron_prune.arch.model import ModelConfig


def nothing(config: ModelConfig) -> dict[str, Any]:
    """Of entries that no file needs, or that are called alike in all versions."""
    return {}


@dataclass(frozen=True, kw_only=True)
class Entries:
    """Fields of :class:`ModelConfig`, and the keys that say them.

    Attributes:
        fields: what is read.
        keys: every key that is looked at.
        read: ``config.json``, with what it leaves out filled in → the fields' values; refuses with :class:`CheckpointError`.
        write: a model → the keys that make a file say it, under names that transformers 4 and 5 read alike.
        renamed: the same under transformers 5's own names; they are written where a file has them already.
        by_layer: whether layers may differ in the fields.
    """

    fields: tuple[str, ...]
    keys: tuple[str, ...]
    read: Callable[[dict[str, Any]], dict[str, Any]]
    write: Callable[[ModelConfig], dict[str, Any]] = nothing
    renamed: Callable[[ModelConfig], dict[str, Any]] = nothing
    by_layer: bool = False

    def rewritten(self, hf: dict[str, Any], config: ModelConfig) -> dict[str, Any]:
        """A ``config.json`` that says ``config``, as both versions read it: keys that are not written any more are left out."""
        written = self.write(config)
        written |= {key: value for key, value in self.renamed(config).items() if key in hf}
        left = {key: value for key, value in hf.items() if key in written or key not in self.keys}
        return left | written
