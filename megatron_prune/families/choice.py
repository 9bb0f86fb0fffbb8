"""The family that a model is written as, and the form in which layers that have sizes of their own are said."""

from __future__ import annotations

import difflib
from dataclasses import replace

from megatron_prune.arch.model import ModelConfig
from megatron_prune.errors import InputError
from megatron_prune.families.family import FAMILIES, Family, kin
from megatron_prune.families.nemotron_nas import NEMOTRON_NAS
from megatron_prune.families.per_layer import PER_LAYER


def choose_family(recorded: Family, asked: str | None, config: ModelConfig) -> Family:
    """The family to write: the recorded one in the form that the model needs, or what was asked for.

    Args:
        config: the model before anything is cut.
        asked: a family of the same architecture (its stock class, whose layers are alike); one with ``-per-layer`` behind its
            name (``per_layer_config``, and a modelling file); or ``nemotron-nas``.

    Raises:
        InputError: if ``asked`` is of another architecture.
    """
    if asked is None:
        return recorded
    if asked == NEMOTRON_NAS.name:
        return replace(recorded, form=asked)
    suffix = f"-{PER_LAYER.name}"
    name, able = asked.removesuffix(suffix), kin(config)
    if name not in (recorded.name, *able):
        forms = [*(name + suffix for name in able), NEMOTRON_NAS.name]
        near = difflib.get_close_matches(asked, (*able, *forms), n=1)
        raise InputError(
            f"--target-family {asked}" + (f"; did you mean {near[0]}?" if near else ""),
            got=f"a {recorded.name} model",
            needed="one of " + ", ".join((*able, *forms)),
        )
    return replace(FAMILIES.get(name), form=PER_LAYER.name if asked.endswith(suffix) else "plain")
