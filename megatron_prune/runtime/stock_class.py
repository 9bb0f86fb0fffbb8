"""The class that computes a Hugging Face model: transformers' own, or ours of the file that leaves with a model whose layers
differ (the installed one: what lies beside a model is never run)."""

from __future__ import annotations

from typing import Any

from megatron_prune.checkpoint.huggingface import HuggingFaceModel
from megatron_prune.families.family import family_of, form_of
from megatron_prune.families.nemotron_nas import NEMOTRON_NAS
from megatron_prune.families.per_layer import PER_LAYER, class_name


def stock_class(hf_config: dict[str, Any]) -> type:
    """The class for causal language modelling of a ``config.json``, which is not of ``nemotron-nas``."""
    import transformers

    architecture = family_of(hf_config).architecture
    if form_of(hf_config) is not PER_LAYER:
        return getattr(transformers, architecture)
    from megatron_prune.families.shipped import modeling_per_layer

    return getattr(modeling_per_layer, class_name(architecture))


def stock_config(hf_config: dict[str, Any]) -> Any:
    """The configuration that such a ``config.json`` means to transformers."""
    from transformers import AutoConfig

    return AutoConfig.for_model(**{key: value for key, value in hf_config.items() if key != "auto_map"})


def stock_class_of(model: HuggingFaceModel) -> tuple[type, Any]:
    """The class that computes a model, and the configuration that is read in its directory.

    transformers has no class of ``nemotron-nas``: such a model is computed by that of the same layers in another form.
    """
    from transformers import AutoConfig

    if form_of(model.hf_config) is NEMOTRON_NAS:
        described = model.family.hf_config(model.config, None)
        return stock_class(described), stock_config(described)
    config = AutoConfig.from_pretrained(model.path, trust_remote_code=False, local_files_only=True)
    return stock_class(model.hf_config), config
