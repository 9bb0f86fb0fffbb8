"""The family that a model is written as."""

from __future__ import annotations

from megatron_prune.errors import InputError
from megatron_prune.families.family import FAMILIES, Family


def choose_family(recorded: Family, asked: str | None) -> Family:
    """The family to write: the recorded one, or another of the same architecture.

    Raises:
        InputError: if ``asked`` is of another architecture.
    """
    family = FAMILIES.get(asked) if asked else recorded
    if family.name not in (recorded.name, *recorded.kin()):
        raise InputError(f"--target-family {asked}", got=f"a {recorded.name} model", needed="one of " + ", ".join(recorded.kin()))
    return family
