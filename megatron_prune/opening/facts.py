"""Facts about a model of either kind, from headers."""

from __future__ import annotations

from collections import Counter
from dataclasses import asdict
from pathlib import Path
from typing import Any

from megatron_prune.arch.model import SHAPE_FIELDS, ModelConfig
from megatron_prune.arch.sharding import legal_tensor_sizes
from megatron_prune.arch.tensors import parameter_count, tensor_ids
from megatron_prune.checkpoint import huggingface, megatron
from megatron_prune.checkpoint.description import Told
from megatron_prune.checkpoint.manifest import Recipe
from megatron_prune.checkpoint.tensor_map import TensorMap


def describe(name_or_path: str, beside: Told = Told()) -> tuple[dict[str, Any], TensorMap]:
    """Facts about a model in either kind of checkpoint, and its tensors.

    Args:
        beside: what is said of a Megatron checkpoint.
    """
    path = Path(name_or_path)
    if path.is_dir() and not huggingface.is_huggingface(path):
        checkpoint = megatron.open_checkpoint(path, beside, incomplete=True)
        head = {"kind": f"Megatron checkpoint ({checkpoint.format})", "family": checkpoint.manifest.family}
        layout = {"tensor": checkpoint.layout.tensor, "pipeline": checkpoint.layout.pipeline}
        padded = {"padded_vocabulary": checkpoint.layout.padded_vocab(checkpoint.config.vocab_size)}
        tail = {"parallel": layout, **padded, "recipe": checkpoint.manifest.recipe, "content_id": checkpoint.manifest.content_id}
        tail["changed_files"] = {name: "edited or removed since it was written" for name in checkpoint.edited_files()}
        facts = _common(checkpoint.config, checkpoint.tensors, checkpoint.path, checkpoint.unsaid)
        return {**head, **facts, **tail}, checkpoint.tensors
    model = huggingface.open_model(huggingface.resolve(name_or_path))
    facts = {"kind": "Hugging Face model", "family": model.family.name, **_common(model.config, model.tensors, model.path)}
    return {**facts, "recipe": Recipe.load(model.path).recipe}, model.tensors


def _common(config: ModelConfig, tensors: TensorMap, path: Path, unsaid: tuple[str, ...] = ()) -> dict[str, Any]:
    dtypes = Counter(str(tensors.dtype(tensor)).removeprefix("torch.") for tensor in tensor_ids(config))
    return {
        "shape": {field: _said(config, field, unsaid) for field in SHAPE_FIELDS},
        "rotary_base": _said(config, "rotary_base", unsaid),
        "rope_scaling": asdict(config.rope_scaling) if config.rope_scaling else None,
        "sliding_window": config.sliding_window,
        "norm_epsilon": _said(config, "norm_epsilon", unsaid),
        "tied_embeddings": config.tie_embeddings,
        "parameters": parameter_count(config),
        "weight_bytes": sum(tensors.nbytes(tensor) for tensor in tensor_ids(config)),
        "bytes_on_disk": sum(file.stat().st_size for file in path.rglob("*") if file.is_file()),
        "dtype": dict(dtypes),
        "tensor_parallel_sizes": legal_tensor_sizes(config),
    }


def _said(config: ModelConfig, name: str, unsaid: tuple[str, ...]) -> Any:
    return "not said" if name in unsaid else getattr(config, name)
