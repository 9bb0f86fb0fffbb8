"""What a verb may be told beside a Megatron checkpoint, since those of Megatron-LM and Bridge do not say all of their model."""

from __future__ import annotations

from dataclasses import dataclass

from megatron_prune.config import option


@dataclass(frozen=True, kw_only=True)
class ForeignOptions:
    """What is said of a checkpoint that does not say all itself."""

    hf_dir: str | None = option(
        "Hugging Face model that the checkpoint is of: what its arguments do not say, config.json and tokenizer (default: those kept "
        "in it)",
        None,
        group="expert",
    )
    believe: str | None = option(
        "who is right where its arguments and --hf-dir differ", None, choices=["args", "hf"], group="expert"
    )
    vocab_size: int | None = option("tokens without padding, where it does not say", None, least=1, group="expert")
    rotary_base: float | None = option("base of the rotary embedding, where it does not say", None, above=0, group="expert")
    ignore_args: tuple[str, ...] = option("stored arguments that are not known here, and change nothing", (), group="expert")
