"""Facts about a model of either kind, from headers."""

from __future__ import annotations

from collections import Counter
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from megatron_prune.arch.model import SHAPE_FIELDS, ModelConfig
from megatron_prune.arch.sharding import legal_tensor_sizes
from megatron_prune.arch.tensors import parameter_count, tensor_ids
from megatron_prune.families.family import Family, family_of
from megatron_prune.serving.demand import served_by

if TYPE_CHECKING:  # torch, which a configuration alone need not wait for
    from megatron_prune.opening.opened import Opened


def describe(model: Opened) -> dict[str, Any]:
    """Facts about a model of either kind."""
    if model.layout is None:
        facts = {"kind": "Hugging Face model", "family": model.family.name, **_common(model)}
        return {**facts, "serving": _serving(model.config, model.family, model.template), "recipe": model.recipe}
    checkpoint, layout = model.checkpoint, model.layout
    return {
        "kind": f"Megatron checkpoint ({checkpoint.format})",
        "family": checkpoint.manifest.family,
        **_common(model, checkpoint.unsaid),
        "parallel": {"tensor": layout.tensor, "pipeline": layout.pipeline},
        "padded_vocabulary": layout.padded_vocab(model.config.vocab_size),
        "serving": _serving(model.config, model.family, model.template),
        "recipe": model.recipe,
        "content_id": model.recorded_identity,
        "changed_files": {name: "edited or removed since it was written" for name in checkpoint.edited_files()},
    }


def _common(model: Opened, unsaid: tuple[str, ...] = ()) -> dict[str, Any]:
    config, tensors = model.config, model.tensors
    dtypes = Counter(str(tensors.dtype(tensor)).removeprefix("torch.") for tensor in tensor_ids(config))
    return {
        **_said_by(config, unsaid),
        "weight_bytes": sum(tensors.nbytes(tensor) for tensor in tensor_ids(config)),
        "bytes_on_disk": sum(file.stat().st_size for file in model.path.rglob("*") if file.is_file()),
        "dtype": dict(dtypes),
        "tensor_parallel_sizes": legal_tensor_sizes(config),
    }


def describe_config(hf_config: dict[str, Any]) -> dict[str, Any]:
    """Facts about a model whose ``config.json`` alone is there."""
    family = family_of(hf_config)
    config = family.model_config(hf_config)
    facts = {"kind": "configuration of a Hugging Face model", "family": family.name, **_said_by(config, ())}
    return {**facts, "tensor_parallel_sizes": legal_tensor_sizes(config), "serving": _serving(config, family, hf_config)}


def _said_by(config: ModelConfig, unsaid: tuple[str, ...]) -> dict[str, Any]:
    return {
        "shape": {field: _said(config, field, unsaid) for field in SHAPE_FIELDS if field not in config.differing},
        **({} if config.is_uniform else {"layers": {field: list(config.each(field)) for field in _differing_sizes(config)}}),
        "rotary_base": _said(config, "rotary_base", unsaid),
        "rope_scaling": _by_layer([asdict(scaling) if scaling else None for scaling in config.each("rope_scaling")]),
        "sliding_window": _by_layer(list(config.each("sliding_window"))),
        "norm_epsilon": _said(config, "norm_epsilon", unsaid),
        "tied_embeddings": config.tie_embeddings,
        "parameters": parameter_count(config),
    }


def _serving(config: ModelConfig, family: Family, template: dict[str, Any] | None) -> dict[str, str]:
    """Runtime → whether it loads the model."""
    found = served_by(config, family, template)
    return {name: "; ".join(problems) or "loads it" for name, problems in found.items()}


def _differing_sizes(config: ModelConfig) -> list[str]:
    return [field for field in SHAPE_FIELDS if field in config.differing]


def _by_layer(values: list[Any]) -> Any:
    """One value, or those of all layers."""
    return values[0] if len(values) == 1 else values


def _said(config: ModelConfig, name: str, unsaid: tuple[str, ...]) -> Any:
    return "not said" if name in unsaid else getattr(config, name)
