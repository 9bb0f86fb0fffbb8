"""What stock transformers makes of a Hugging Face directory: its class's parameters, and a forward pass of one layer."""

from __future__ import annotations

import importlib
from typing import Any

import torch

from megatron_prune.arch.tensors import tensor_ids
from megatron_prune.checkpoint.huggingface import HuggingFaceModel
from megatron_prune.files.documents import shorten
from megatron_prune.files.region import closed_files

TOKENS = 8
"""Rows of the vocabulary that the small model has, and tokens it is run on."""


def import_stock_class(family: str) -> None:
    """Import what :func:`check_in_transformers` needs: two seconds, which may pass while files are written."""
    from transformers import AutoConfig, AutoModelForCausalLM  # noqa: F401

    importlib.import_module(f"transformers.models.{family}.modeling_{family}")


def check_in_transformers(model: HuggingFaceModel) -> tuple[str, list[str]]:
    """Build the class that ``config.json`` names without memory, compare its parameters with the files, and run a model of its
    first layer, float32, on a few tokens.

    Returns:
        The class's name, and what is wrong: that transformers refuses it, parameters of another name or shape, values that are
        not finite.
    """
    try:
        return _build_and_run(model)
    except Exception as error:  # a configuration that transformers does not do fails in any of its parts
        text = shorten(f"{type(error).__name__}: {str(error).strip()}", 300)
        return "", [f"transformers cannot run it: {text}"]


def _build_and_run(model: HuggingFaceModel) -> tuple[str, list[str]]:
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.from_pretrained(model.path, trust_remote_code=False, local_files_only=True)
    with torch.device("meta"):
        whole = AutoModelForCausalLM.from_config(config, trust_remote_code=False)
    wanted = {name: tuple(parameter.shape) for name, parameter in whole.named_parameters()}
    stored = {model.family.tensor_name(tensor): model.tensors.shape(tensor) for tensor in tensor_ids(model.config)}
    differing = sorted(name for name in wanted.keys() | stored.keys() if wanted.get(name) != stored.get(name))
    kind = type(whole).__name__
    if differing:
        return kind, [f"{name}: {kind} wants {wanted.get(name)}, the file holds {stored.get(name)}" for name in differing]
    with closed_files():
        logits = _run(type(whole), type(config).from_dict(_one_layer(config.to_dict())), model)
    return kind, [] if logits.isfinite().all() else [f"layer 0 computes NaN or infinity in {kind}"]


def _one_layer(config: dict[str, Any]) -> dict[str, Any]:
    """The configuration of a model of the first layer and the first tokens."""
    small = {"num_hidden_layers": 1, "vocab_size": min(TOKENS, config["vocab_size"]), "pad_token_id": None}
    if config.get("layer_types"):
        small["layer_types"] = config["layer_types"][:1]
    return {**config, **small}


def _run(kind: type, config: Any, model: HuggingFaceModel) -> torch.Tensor:
    """Logits, float32 [1, tokens, tokens]."""
    with torch.device("meta"):
        small = kind(config).float().eval()
    weights = {}
    for tensor in tensor_ids(model.config):
        if tensor.layer in (None, 0):
            rows = model.tensors.shape(tensor)[0]
            rows = min(rows, config.vocab_size) if tensor.role in ("embedding", "output") else rows
            weights[model.family.tensor_name(tensor)] = model.tensors.read_block(tensor, range(rows)).float()
    small.load_state_dict(weights, strict=False, assign=True)
    small.tie_weights()
    small.model.rotary_emb = type(small.model.rotary_emb)(config=config)  # its tables are no parameters
    with torch.no_grad():
        return small(torch.arange(config.vocab_size)[None], use_cache=False).logits
