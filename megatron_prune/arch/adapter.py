"""What a low-rank adapter is: its rank, its scale, the role matrices it changes."""

from __future__ import annotations

import math
from dataclasses import dataclass

from megatron_prune.errors import InputError

TARGETS = {
    "q_proj": ("q",),
    "k_proj": ("k",),
    "v_proj": ("v",),
    "o_proj": ("o",),
    "gate_proj": ("gate",),
    "up_proj": ("up",),
    "down_proj": ("down",),
    "linear_qkv": ("q", "k", "v"),
    "linear_proj": ("o",),
    "linear_fc1": ("gate", "up"),
    "linear_fc2": ("down",),
}
"""A name of Hugging Face's or Megatron's → roles."""


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
        known = {role for roles in TARGETS.values() for role in roles}
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


def target_roles(targets: tuple[str, ...]) -> tuple[str, ...]:
    """Roles that names such as ``q_proj`` or ``linear_qkv`` stand for, each once.

    Raises:
        InputError: on another name.
    """
    unknown = [name for name in targets if name not in TARGETS]
    if unknown or not targets:
        raise InputError("--lora-targets", got=" ".join(unknown) or "nothing", needed="some of " + ", ".join(TARGETS))
    return tuple(dict.fromkeys(role for name in targets for role in TARGETS[name]))
