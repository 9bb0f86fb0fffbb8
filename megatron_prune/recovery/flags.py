"""Flags of ``recover`` and ``teach`` that mean something beside others alone: refused where they would have no effect, given their
default where they have. Each needs one other flag; what a pruning needs follows from the plan (``pruning/flags.py``)."""

from __future__ import annotations

import dataclasses
from typing import Any, Callable, NamedTuple, TypeVar

from megatron_prune.config import flag
from megatron_prune.errors import InputError

Options = TypeVar("Options")


class Needs(NamedTuple):
    """What a flag is without effect unless.

    Attributes:
        beside: what has to be there, in words.
        there: whether it is.
        default: of the flag where it has an effect; a function of the options, or a value.
    """

    beside: str
    there: Callable[[Any], Any]
    default: Any


def filled(options: Options, rules: dict[str, Needs]) -> Options:
    """The options with the defaults of what was not given (``None`` or nothing).

    Raises:
        InputError: naming a flag that was given and has no effect.
    """
    chosen = {}
    for name, (beside, there, default) in rules.items():
        value = getattr(options, name)
        if value is None:
            chosen[name] = default(options) if callable(default) else default
        elif value != default and not there(options):
            shown = " ".join(map(str, value)) if isinstance(value, tuple) else value
            raise InputError(f"{flag(name)} {shown} has no effect without {beside}", do="leave it out")
    return dataclasses.replace(options, **chosen)


SEPARATE_DATA = {
    "split": Needs(
        "--data-path: the blends of --train-data-path and the like are not cut",
        lambda o: o.data_path or not o.train_data_path,
        "969,30,1",
    ),
    "valid_data_path": Needs("--train-data-path: --data-path is cut by --split", lambda o: o.train_data_path, ()),
    "test_data_path": Needs("--train-data-path: --data-path is cut by --split", lambda o: o.train_data_path, ()),
}
"""Of the flags that name data."""


DATA = ("train_iters", "global_batch_size", "data_path", "split", "train_data_path", "valid_data_path", "test_data_path")


SHARED = (*DATA, "seq_length", "seed", "eval_iters", "distill_temperature")
"""What a recovery must have the same."""
