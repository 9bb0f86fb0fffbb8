"""What a verb asks beside a Megatron checkpoint, since those of Megatron-LM and Bridge do not say all of their model."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from megatron_prune.checkpoint import huggingface
from megatron_prune.checkpoint.description import Told
from megatron_prune.config import option, require_positive
from megatron_prune.errors import InputError
from megatron_prune.runtime.megatron_flags import model_fields


@dataclass(frozen=True, kw_only=True)
class ForeignOptions:
    """What is said of a checkpoint that does not say all itself."""

    hf_dir: str | None = option(
        "Hugging Face model that the checkpoint is of: what its arguments do not say, config.json and tokenizer (default: those kept "
        "in it)",
        None,
    )
    believe: str | None = option("who is right where its arguments and --hf-dir differ", None, choices=["args", "hf"])
    vocab_size: int | None = option("tokens without padding, where it does not say", None)
    rotary_base: float | None = option("base of the rotary embedding, where it does not say", None)
    ignore_args: tuple[str, ...] = option("stored arguments that are not known here, and change nothing", ())


def told(options: ForeignOptions, flags: dict[str, Any] | None = None) -> Told:
    """The options as what is said of a checkpoint.

    Args:
        flags: Megatron's own, where a verb takes them.

    Raises:
        InputError: on a value that is none, or --believe without two to believe.
    """
    require_positive(options, "vocab_size")
    base = options.rotary_base
    if base is not None and not 0 < base < float("inf"):
        raise InputError("--rotary-base", got=base, needed="a positive number")
    if options.believe and not options.hf_dir:
        raise InputError("--believe without --hf-dir", do="name the model with --hf-dir, or leave it out")
    said = {"vocab_size": options.vocab_size, "rotary_base": base, **model_fields(flags or {})}
    return Told(
        hf_dir=huggingface.resolve(options.hf_dir, weights=False) if options.hf_dir else None,
        believe=options.believe,
        values={name: value for name, value in said.items() if value is not None},
        ignored=frozenset(name for word in options.ignore_args for name in word.split(",") if name),
    )
