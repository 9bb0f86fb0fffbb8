"""What every verb that writes a model may be asked."""

from __future__ import annotations

from dataclasses import dataclass

from megatron_prune.config import option


@dataclass(frozen=True, kw_only=True)
class CheckOptions:
    """Whether what was written is checked."""

    no_check: bool = option(
        "leave out the check of what was written (it is reopened and compared before it is put in place)", False, group="run"
    )


@dataclass(frozen=True, kw_only=True)
class OutputOptions(CheckOptions):
    """How an output may come about."""

    overwrite: bool = option("replace an existing output directory", False, group="run")
    strict: bool = option("refuse weights that hold NaN or infinity instead of warning", False, group="expert")


@dataclass(frozen=True, kw_only=True)
class HuggingFaceOptions:
    """As what a Hugging Face directory is written."""

    target_family: str | None = option(
        "write as another family of the same architecture, such as mistral; or layers that differ as llama-per-layer "
        "(transformers, with a file of code) or nemotron-nas (vLLM and others)",
        None,
        group="model",
    )
    max_shard_size: str = option("split weight files larger than this", "5GB", group="expert")


@dataclass(frozen=True, kw_only=True)
class PushOptions:
    """Whether a Hugging Face directory goes to the hub."""

    push_to_hub: str | None = option(
        "also upload the result to this repository of the hub (owner/name), made private", None, group="model"
    )
    push_public: bool = option("let everybody see that repository", False, group="model")


@dataclass(frozen=True, kw_only=True)
class CardOptions:
    """What the card of an exported model, and an adapter's configuration, name."""

    evaluations: tuple[str, ...] = option(
        "files of megatron-prune evaluate --output for the card: of this model, or of the one that was pruned",
        (),
        group="model",
        exists=True,
    )
    base_model_name: str | None = option(
        "Hugging Face model that --adapter-only names as the adapter's: a directory or a hub id (default: the one that was "
        "converted, where the adapter was trained on that)",
        None,
        group="expert",
    )
