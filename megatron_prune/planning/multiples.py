"""Sizes that hardware likes: ``--multiple-of hidden=64,ffn=128``."""

from __future__ import annotations

import re

from megatron_prune.arch.model import ModelConfig
from megatron_prune.axes.axis import AXES
from megatron_prune.errors import InputError, raise_all

VARIED = ("hidden", "ffn", "head", "kv_head", "layer")
"""Axes that a budget may cut."""


def parse_multiples(text: str, flag: str = "--multiple-of") -> dict[str, int]:
    """``"hidden=64,ffn=128"`` → ``{"hidden": 64, "ffn": 128}``.

    Raises:
        InputError: on an unknown axis, one named twice, or a step that is not a positive number.
    """
    steps: dict[str, int] = {}
    for part in text.replace(" ", "").split(","):
        match = re.fullmatch(r"(\w+)=([0-9]{1,12})", part)
        if not match or match[1] in steps:
            why = f"{match[1]} twice" if match else repr(text[:80])
            raise InputError(flag, got=why, needed="axes and their steps, such as hidden=64,ffn=128")
        steps[match[1]] = int(match[2])
    raise_all(InputError, flag, step_problems(steps))
    return steps


def check_multiples(config: ModelConfig, new: ModelConfig, multiple_of: dict[str, int]) -> None:
    """Refuse an exact request whose sizes are no multiples; a size that does not change need not be one.

    Args:
        config: the model.
        new: the completed request (:func:`target.resolve_target`).

    Raises:
        InputError: naming the nearest sizes that would do, or steps that no size of this model can have.
    """
    raise_all(InputError, "--multiple-of", step_problems(multiple_of, config))
    problems = []
    for name, step in multiple_of.items():
        field = AXES.get(name).field
        old, by_layer = max(config.each(field)), len(new.each(field)) > 1
        for asked in sorted(set(new.each(field)) - set(config.each(field))):
            if asked % step:
                below = asked - asked % step
                near = [size for size in (below, min(below + step, old)) if size]
                what = f"{field} {asked} of a layer" if by_layer else f"{field}_remain {asked}"
                problems.append(f"{what} is not a multiple of {step}; nearest: {' or '.join(map(str, near))}")
    raise_all(InputError, "the requested shape is not of the multiples asked for", problems)


def step_problems(multiple_of: dict[str, int], config: ModelConfig | None = None) -> list[str]:
    problems = []
    for name, step in multiple_of.items():
        if name not in VARIED:
            problems.append(f"unknown axis {name!r}, needed one of {', '.join(VARIED)}")
        elif step < 1:
            problems.append(f"{name}={step} is not a positive number")
        elif config is not None and step > (size := max(config.each(AXES.get(name).field))):
            problems.append(f"{name}={step} is larger than the model's {size}")
    return problems
