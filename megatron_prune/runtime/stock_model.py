"""A Hugging Face model in transformers' own class: no foreign code, no question, no pickle, no adapter beside the weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from megatron_prune.arch.tensors import EMBEDDING, HEAD, tensor_ids
from megatron_prune.checkpoint import huggingface
from megatron_prune.checkpoint.huggingface import HuggingFaceModel
from megatron_prune.errors import InputError, reason
from megatron_prune.files.region import Scratch, closed_files
from megatron_prune.runtime.reporting import no_bars
from megatron_prune.runtime.stock_class import stock_class_of


def load_stock_model(folder: Path, *, dtype: torch.dtype | None = None) -> Any:
    """The model of a directory, in evaluation mode on the CPU.

    Args:
        dtype: element type of all weights (default: as ``config.json`` says).

    Raises:
        CheckpointError: if the directory holds no whole model of a family that is carried.
        InputError: if transformers cannot load it.
    """
    model = huggingface.open_model(folder)
    try:
        kind, config = stock_class_of(model)
        if model.in_safetensors:
            safe = {"trust_remote_code": False, "local_files_only": True, "use_safetensors": True}
            with no_bars():
                stock = kind.from_pretrained(folder, config=config, dtype=dtype or "auto", attn_implementation="sdpa", **safe)
            return stock.eval()
        # transformers would unpickle a .bin; its bytes are read here instead.
        stock = kind(config).to(dtype or config.dtype or model.tensors.dtype(EMBEDDING))
        stock.load_state_dict(_state_dict(model))
        return stock.eval()
    except InputError:
        raise
    except Exception as error:  # a configuration or a file that transformers does not do fails in any of its parts
        raise InputError(f"transformers cannot load the model in {folder}", got=reason(error)) from None


def _state_dict(model: HuggingFaceModel) -> dict[str, torch.Tensor]:
    """Name → tensor in memory of its own."""
    found: dict[str, torch.Tensor] = {}
    with closed_files():
        for tensor in tensor_ids(model.config):
            found[model.family.tensor_name(tensor)] = model.tensors.read(tensor, Scratch())
    for name, matrix in model.family.zero_tensors(model.config).items():
        found[name] = torch.zeros(model.tensors.shape(matrix)[0], dtype=model.tensors.dtype(matrix))
    if model.config.tie_embeddings:
        found[model.family.tensor_name(HEAD)] = found[model.family.tensor_name(EMBEDDING)]
    return found
