"""What a verb asks beside a Megatron checkpoint, since those of Megatron-LM and Bridge do not say all of their model."""

from __future__ import annotations

from typing import Any

from megatron_prune.checkpoint import model_folder
from megatron_prune.checkpoint.description import Told
from megatron_prune.config import check_limits
from megatron_prune.errors import InputError
from megatron_prune.opening.options import ForeignOptions
from megatron_prune.runtime.megatron_flags import model_fields


def told(options: ForeignOptions, flags: dict[str, Any] | None = None) -> Told:
    """The options as what is said of a checkpoint.

    Args:
        flags: Megatron's own, where a verb takes them.

    Raises:
        InputError: on a value that is none, or --believe without two to believe.
    """
    check_limits(options)
    if options.believe and not options.hf_dir:
        raise InputError("--believe without --hf-dir", do="name the model with --hf-dir, or leave it out")
    said = {"vocab_size": options.vocab_size, "rotary_base": options.rotary_base, **model_fields(flags or {})}
    return Told(
        hf_dir=model_folder.resolve(options.hf_dir, weights=False) if options.hf_dir else None,
        believe=options.believe,
        values={name: value for name, value in said.items() if value is not None},
        ignored=frozenset(name for word in options.ignore_args for name in word.split(",") if name),
    )
