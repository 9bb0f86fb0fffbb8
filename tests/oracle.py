"""A model by its formulas alone, in float64: what every runtime is compared with where no stock class can say the model."""

from __future__ import annotations

from pathlib import Path

import torch
from torch.nn.functional import gelu, silu

from megatron_prune.arch.model import ModelConfig
from megatron_prune.arch.tensors import EMBEDDING, FINAL_NORM, HEAD, TensorId, full_shape, tensor_ids
from megatron_prune.checkpoint import huggingface, megatron, model_folder
from megatron_prune.checkpoint.manifest import Manifest
from megatron_prune.checkpoint.stream import content_id, stream
from megatron_prune.files.region import Scratch

Model = dict[TensorId, torch.Tensor]


def random_model(config: ModelConfig, seed: int = 0) -> Model:
    """Float32 weights, no two units alike; norms near what leaves a stream as it is."""
    generator, model = torch.Generator().manual_seed(seed), {}
    for tensor in tensor_ids(config):
        shape = full_shape(tensor, config)
        values = torch.randn(shape, generator=generator)
        if "norm" in tensor.role:
            model[tensor] = (1.0 - config.norm_offset) + 0.3 * values
        elif len(shape) == 1:
            model[tensor] = 0.2 * values
        else:
            model[tensor] = values / shape[1] ** 0.5
    return model


def model_of(path: Path) -> tuple[ModelConfig, Model]:
    """What a directory or a checkpoint of ours holds."""
    opened = megatron.open_checkpoint(path) if model_folder.is_megatron(path) else huggingface.open_model(path)
    whole = lambda tensor: opened.tensors.read_block(tensor, range(opened.tensors.shape(tensor)[0]))
    return opened.config, {tensor: whole(tensor) for tensor in tensor_ids(opened.config)}


def logits(config: ModelConfig, model: Model, tokens: torch.Tensor) -> torch.Tensor:
    """float64 [samples, tokens, vocabulary]; layer by layer as ``config`` says."""
    at = lambda tensor: model[tensor].double()
    stream = at(EMBEDDING)[tokens] * (config.hidden_size**0.5 if config.scaled_embedding else 1.0)
    for layer in range(config.num_layers):
        own, weight = config.of_layer(layer), lambda role: at(TensorId(role, layer))
        if own.num_attention_heads:
            added = attention(own, weight, norm(own, stream, weight("input_norm")))
            stream = stream + (norm(own, added, weight("o_norm")) if own.after_norms else added)
        if own.ffn_hidden_size:
            normed = norm(own, stream, weight("post_norm"))
            act = silu if own.activation == "silu" else lambda x: gelu(x, approximate="tanh")
            added = (act(normed @ weight("gate").T) * (normed @ weight("up").T)) @ weight("down").T
            stream = stream + (norm(own, added, weight("down_norm")) if own.after_norms else added)
    return norm(config, stream, at(FINAL_NORM)) @ at(EMBEDDING if config.tie_embeddings else HEAD).T


def norm(config: ModelConfig, stream: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    return stream * (stream.square().mean(-1, keepdim=True) + config.norm_epsilon).rsqrt() * (weight + config.norm_offset)


def attention(config: ModelConfig, weight, normed: torch.Tensor) -> torch.Tensor:
    samples, count, _ = normed.shape
    d, heads, groups = config.kv_channels, config.num_attention_heads, config.num_query_groups
    bias = (lambda role: weight(f"{role}_bias")) if config.qkv_bias else (lambda role: 0.0)
    q, k, v = (normed @ weight(role).T + bias(role) for role in ("q", "k", "v"))
    q, k, v = q.view(samples, count, heads, d), k.view(samples, count, groups, d), v.view(samples, count, groups, d)
    if config.qk_norm:
        q, k = norm(config, q, weight("q_norm")), norm(config, k, weight("k_norm"))
    assert config.rope_scaling is None
    rates = torch.zeros(d // 2) if config.rotary_base is None else config.rotary_base ** (-torch.arange(0, d, 2).double() / d)
    places = torch.arange(count, dtype=torch.float64)[:, None] * rates
    cos, sin = (part.repeat(1, 2)[None, :, None] for part in (places.cos(), places.sin()))
    turn = lambda x: x * cos + torch.cat([-x[..., d // 2 :], x[..., : d // 2]], dim=-1) * sin
    q, k, v = turn(q), turn(k).repeat_interleave(heads // groups, 2), v.repeat_interleave(heads // groups, 2)
    scores = torch.einsum("sthd,suhd->shtu", q, k) * (config.softmax_scale or d**-0.5)
    seen = torch.ones(count, count, dtype=torch.bool).tril()
    if config.sliding_window is not None:
        seen = seen.triu(1 - config.sliding_window)
    context = torch.einsum("shtu,suhd->sthd", scores.masked_fill(~seen, -torch.inf).softmax(-1), v)
    return context.reshape(samples, count, heads * d) @ weight("o").T


def write_checkpoint(
    save: Path, config: ModelConfig, model: Model, layout, *, family: str, ckpt_format: str = "torch_dist"
) -> Path:
    """A Megatron checkpoint of ours that holds ``model``."""
    save.mkdir()
    dtypes = {tensor: data.dtype for tensor, data in model.items()}
    folder = megatron.lay_out(save, save, config, layout, dtypes, ckpt_format=ckpt_format, tokenizer=False)
    target, scratch = megatron.open_target(folder, config, layout, ckpt_format), Scratch()
    digests = {str(tensor): target.write(tensor, data, scratch) for tensor, data in model.items()}
    told = Manifest(family=family, model=config, layout=layout, digests={str(t): digests[str(t)] for t in tensor_ids(config)})
    megatron.finish(folder, told)
    report = stream(megatron.open_checkpoint(save).tensors, None)
    told = Manifest(**{**vars(told), "content_id": content_id(report.digests)})
    megatron.finish(folder, told)
    return save
