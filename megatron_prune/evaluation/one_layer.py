"""What stock transformers makes of a Hugging Face directory: its class's parameters, and a forward pass of a layer of each kind."""

from __future__ import annotations

import importlib
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

from megatron_prune.arch.model import ModelConfig
from megatron_prune.arch.tensors import EMBEDDING, HEAD, tensor_ids
from megatron_prune.checkpoint.huggingface import HuggingFaceModel
from megatron_prune.families.family import form_of
from megatron_prune.families.form import code_of
from megatron_prune.families.nemotron_nas import NEMOTRON_NAS
from megatron_prune.files.documents import shorten
from megatron_prune.files.region import closed_files
from megatron_prune.runtime.stock_class import stock_class_of

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
    kind, config = stock_class_of(model)
    _check_blocks(model)
    with torch.device("meta"):
        whole = kind(config)
    wanted = {name: tuple(parameter.shape) for name, parameter in whole.named_parameters()}
    stored = {model.family.tensor_name(tensor): model.tensors.shape(tensor) for tensor in tensor_ids(model.config)}
    zeros = model.family.zero_tensors(model.config)
    stored |= {name: model.tensors.shape(matrix)[:1] for name, matrix in zeros.items()}
    differing = sorted(name for name in wanted.keys() | stored.keys() if wanted.get(name) != stored.get(name))
    name = kind.__name__
    if differing:
        return name, [f"{each}: {name} wants {wanted.get(each)}, the file holds {stored.get(each)}" for each in differing]
    described = config.to_dict()
    layers = _one_of_each(described, model.config)
    with closed_files():
        logits = _run(kind, type(config).from_dict(_small(described, layers)), model, layers)
    return name, [] if logits.isfinite().all() else [f"layer {' or '.join(map(str, layers))} computes NaN or infinity in {name}"]


def _check_blocks(model: HuggingFaceModel) -> None:
    """Read ``nemotron-nas`` with the class of the configuration that lies beside the model, where that is ours.

    Raises:
        ValueError: if it means other layers.
    """
    if form_of(model.hf_config) is not NEMOTRON_NAS or not code_of(model.hf_config):
        return
    from megatron_prune.families.shipped.configuration_nemotron_nas import DeciLMConfig

    read = [(block.attention.no_op, block.ffn.no_op) for block in DeciLMConfig.from_dict(model.hf_config).block_configs]
    layers = [model.config.of_layer(layer) for layer in range(model.config.num_layers)]
    halves = [{kind.half for kind in layer.kinds} for layer in layers]
    if read != [("attention" not in found, "mlp" not in found) for found in halves]:
        raise ValueError("its block_configs mean other layers")


def _one_of_each(described: dict[str, Any], config: ModelConfig) -> list[int]:
    """The first layer of every kind: by its type, and by the blocks that it has."""
    types = described.get("layer_types") or [""] * config.num_layers
    kinds = [(kind, config.of_layer(layer).blocks) for layer, kind in enumerate(types)]
    return sorted(map(kinds.index, set(kinds)))


def _small(config: dict[str, Any], layers: list[int]) -> dict[str, Any]:
    """The configuration of a model of these layers and the first tokens."""
    small = {"num_hidden_layers": len(layers), "vocab_size": min(TOKENS, config["vocab_size"]), "pad_token_id": None}
    if config.get("layer_types"):
        small["layer_types"] = [config["layer_types"][layer] for layer in layers]
    if differing := {int(layer): own for layer, own in (config.get("per_layer_config") or {}).items()}:
        small["per_layer_config"] = {str(place): differing[layer] for place, layer in enumerate(layers) if layer in differing}
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
    for matrix in model.family.zero_tensors(model.config).values():
        if matrix.layer in places:
            name = model.family.zeros[matrix.role].format(layer=places[matrix.layer])
            weights[name] = torch.zeros(model.tensors.shape(matrix)[0])
    small.load_state_dict(weights, strict=False, assign=True)
    small.tie_weights()
    with torch.no_grad():
        return small(torch.arange(config.vocab_size)[None], use_cache=False).logits
