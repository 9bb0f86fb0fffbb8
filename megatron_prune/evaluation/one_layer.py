"""What stock transformers makes of a Hugging Face directory: its class's parameters, and a forward pass of a layer of each kind."""

from __future__ import annotations

import importlib
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

from megatron_prune.arch.tensors import EMBEDDING, HEAD, tensor_ids
from megatron_prune.checkpoint.huggingface import HuggingFaceModel
from megatron_prune.files.documents import shorten
from megatron_prune.files.region import closed_files

TOKENS = 8
"""Rows of the vocabulary that the small model has, and tokens it is run on."""


def import_stock_class(architecture: str) -> None:
    """Import what :func:`check_in_transformers` needs: two seconds, which may pass while files are written."""
    from transformers import AutoConfig, AutoModelForCausalLM  # noqa: F401

    getattr(importlib.import_module("transformers"), architecture)


def check_in_transformers(model: HuggingFaceModel) -> tuple[str, list[str]]:
    """Build the class that ``config.json`` names without memory, compare its parameters with the files, and run a model of its
    first layer (of each kind, where ``layer_types`` has several), float32, on a few tokens.

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
    described = config.to_dict()
    layers = _one_of_each(described)
    with closed_files():
        logits = _run(type(whole), type(config).from_dict(_small(described, layers)), model, layers)
    return kind, [] if logits.isfinite().all() else [f"layer {' or '.join(map(str, layers))} computes NaN or infinity in {kind}"]


def _one_of_each(config: dict[str, Any]) -> list[int]:
    """The first layer of every kind."""
    types = config.get("layer_types") or [""]
    return sorted(map(types.index, set(types)))


def _small(config: dict[str, Any], layers: list[int]) -> dict[str, Any]:
    """The configuration of a model of these layers and the first tokens."""
    small = {"num_hidden_layers": len(layers), "vocab_size": min(TOKENS, config["vocab_size"]), "pad_token_id": None}
    if config.get("layer_types"):
        small["layer_types"] = [config["layer_types"][layer] for layer in layers]
    return {**config, **small}


class _NoWeights(TorchFunctionMode):
    """Weights are made without memory; what a class computes once and keeps (positions, scales) is computed."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs = dict(kwargs or {})
        if function is torch.empty:
            kwargs["device"] = "meta"
        return function(*args, **kwargs)


def _run(kind: type, config: Any, model: HuggingFaceModel, layers: list[int]) -> torch.Tensor:
    """Logits, float32 [1, tokens, tokens]."""
    with _NoWeights():
        small = kind(config).float().eval()
    weights, places = {}, {layer: place for place, layer in enumerate(layers)}
    for tensor in tensor_ids(model.config):
        if tensor.layer is None or tensor.layer in places:
            rows = model.tensors.shape(tensor)[0]
            rows = min(rows, config.vocab_size) if tensor in (EMBEDDING, HEAD) else rows
            name = model.family.tensor_name(tensor._replace(layer=places.get(tensor.layer)))
            weights[name] = model.tensors.read_block(tensor, range(rows)).float()
    small.load_state_dict(weights, strict=False, assign=True)
    small.tie_weights()
    with torch.no_grad():
        return small(torch.arange(config.vocab_size)[None], use_cache=False).logits
