"""What a low-rank adapter is: its rank, its scale, the role matrices it changes."""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass

from megatron_prune.arch.blocks.block import BLOCKS
from megatron_prune.errors import InputError


@functools.cache
def targets() -> dict[str, tuple[str, ...]]:
    """A name of Hugging Face's (``q_proj``) or Megatron's (``linear_qkv``) → roles."""
    kinds = [BLOCKS.get(name) for name in BLOCKS.names()]
    found = {f"{role}_proj": (role,) for kind in kinds for role in kind.matrices}
    fused = [tensor for kind in kinds for tensor in kind.megatron if set(tensor.roles) <= set(kind.matrices)]
    return found | {tensor.module.rpartition(".")[2]: tensor.roles for tensor in fused}


@dataclass(frozen=True, kw_only=True)
class AdapterConfig:
    """``W + alpha / r · B · A`` for every matrix of ``roles``.

    Attributes:
        dropout: share of the inputs to A that training drops.
        seed: that the first A is drawn with.

    Raises:
        InputError: naming what is out of its range.
    """

    r: int
    alpha: float
    dropout: float
    roles: tuple[str, ...]
    seed: int

    def __post_init__(self):
        known = {role for roles in targets().values() for role in roles}
        for name, right, needed in (
            ("r", self.r >= 1, "a positive number"),
            ("alpha", 0 < self.alpha < math.inf, "a positive number"),
            ("dropout", 0 <= self.dropout < 1, "from 0 on, below 1"),
            ("roles", self.roles and set(self.roles) <= known, "some of " + ", ".join(sorted(known))),
        ):
            if not right:
                raise InputError(f"the adapter's {name}", got=getattr(self, name), needed=needed)

    @property
    def scale(self) -> float:
        """What B · A counts."""
        return self.alpha / self.r


def target_roles(names: tuple[str, ...]) -> tuple[str, ...]:
    """Roles that names such as ``q_proj`` or ``linear_qkv`` stand for, each once.

    Raises:
        InputError: on another name.
    """
    known = targets()
    unknown = [name for name in names if name not in known]
    if unknown or not names:
        raise InputError("--lora-targets", got=" ".join(unknown) or "nothing", needed="some of " + ", ".join(known))
    return tuple(dict.fromkeys(role for name in names for role in known[name]))
