"""The layer spec: Transformer Engine's where it can be imported and there is CUDA, else megatron-core's local layers.

Four modules of the local spec are replaced. Its core attention materialises the scores and forks an RNG state that
exists on CUDA only; its self-attention rotates every cached key again at every step of decoding; its RMSNorm refuses
sequence parallelism; its MLP keeps and copies the halves of gate and up apart.
"""

from __future__ import annotations

import importlib.util
from typing import Callable

import torch
from megatron.core import parallel_state
from megatron.core.inference.contexts import BaseInferenceContext
from megatron.core.models.common.embeddings.rope_utils import apply_rotary_pos_emb
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec, get_gpt_layer_with_transformer_engine_spec
from megatron.core.tensor_parallel.layers import ColumnParallelLinear, RowParallelLinear
from megatron.core.transformer.attention import SelfAttention
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.identity_op import IdentityFuncOp, IdentityOp
from megatron.core.transformer.mlp import MLP, MLPSubmodules
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn.functional import rms_norm, scaled_dot_product_attention, silu

from megatron_prune.arch.model import ModelConfig
from megatron_prune.runtime.core_config import DescribedConfig
from megatron_prune.runtime.rotary import angles, inverse_frequencies


def has_transformer_engine() -> bool:
    """Whether Transformer Engine's layers can be used here."""
    return torch.cuda.is_available() and importlib.util.find_spec("transformer_engine") is not None


def decoder_spec(core: DescribedConfig, layers: range, *, local: bool) -> ModuleSpec | TransformerBlockSubmodules:
    """The spec of a stage's decoder layers, and of the final norm.

    Args:
        local: megatron-core's local layers in any case. Those of Transformer Engine are taken for what its spec can say.
    """
    config = core.described
    plain = not (config.differing or config.after_norms or config.scaled_embedding)
    if has_transformer_engine() and plain and not local:
        return get_gpt_layer_with_transformer_engine_spec(qk_layernorm=core.qk_layernorm)
    specs = [local_layer_spec(config.of_layer(layer)) for layer in layers]
    return TransformerBlockSubmodules(layer_specs=specs, layer_norm=RMSNorm)


def local_layer_spec(config: ModelConfig) -> ModuleSpec:
    """megatron-core's local layers, in which every norm is a module of its own, with our attention, norms and MLP.

    Args:
        config: of the layer; what stands for a block that it has not hands the stream on.
    """
    spec = get_gpt_layer_local_spec(qk_layernorm=config.qk_norm, normalization="RMSNorm")
    parts, attention = spec.submodules, spec.submodules.self_attention.submodules
    parts.input_layernorm = parts.pre_mlp_layernorm = RMSNorm
    spec.submodules.self_attention.module = CachingSelfAttention
    attention.core_attention = SdpaAttention
    parts.mlp = GatedMLP
    if config.qk_norm:
        attention.q_layernorm = attention.k_layernorm = RMSNorm
    if config.after_norms:
        attention.linear_proj = NormedRowParallelLinear
    if not config.units("head"):
        parts.input_layernorm, parts.self_attention, parts.self_attn_bda = IdentityOp, IdentityOp, IdentityFuncOp
    if not config.units("ffn"):
        parts.pre_mlp_layernorm, parts.mlp, parts.mlp_bda = IdentityOp, IdentityOp, IdentityFuncOp
    return spec


class RMSNorm(nn.RMSNorm):
    """RMSNorm (Zhang & Sennrich 2019, arXiv 1910.07467) under megatron-core's constructor; weight [hidden_size]."""

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float = 1e-5, **_: object):
        super().__init__(hidden_size, eps=eps, dtype=config.params_dtype)
        self.weight.sequence_parallel = config.sequence_parallel
        self._zero_centered = config.layernorm_zero_centered_gamma

    def forward(self, stream: Tensor) -> Tensor:
        """[..., hidden_size] → the same."""
        on_gpu = stream.is_cuda or not torch.is_grad_enabled()
        if not self._zero_centered:
            return super().forward(stream) if on_gpu else _RMSNormOnCpu.apply(stream, self.weight, self.eps)
        weight = 1.0 + self.weight.float()  # what is near one loses the weight's digits in half precision
        if on_gpu:
            return rms_norm(stream.float(), self.normalized_shape, weight, self.eps).to(stream.dtype)
        return _RMSNormOnCpu.apply(stream, weight, self.eps)


class _RMSNormOnCpu(torch.autograd.Function):
    """What torch has as one kernel on CUDA only: half the passes of its composite backward, and a third of what it keeps.

    The forward pass gives the bits of ``nn.RMSNorm``.
    """

    @staticmethod
    def forward(ctx, stream: Tensor, weight: Tensor, eps: float) -> Tensor:
        exact = stream.to(torch.promote_types(stream.dtype, torch.float32))
        inverse = exact.square().mean(-1, keepdim=True).add_(eps).rsqrt_()
        ctx.save_for_backward(stream, weight, inverse)
        return (exact * inverse).mul_(weight).to(stream.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor) -> tuple[Tensor, Tensor | None, None]:
        stream, weight, inverse = ctx.saved_tensors
        normed = stream * inverse
        product = grad * normed
        of_weight = product.flatten(0, -2).sum(0).to(weight.dtype) if ctx.needs_input_grad[1] else None  # adapters train alone
        along = torch.mv(product.flatten(0, -2), weight.to(product.dtype)).view(inverse.shape).div_(-stream.shape[-1])
        of_stream = normed.mul_(along).addcmul_(grad, weight).mul_(inverse)
        return of_stream.to(stream.dtype), of_weight, None


class NormedRowParallelLinear(RowParallelLinear):
    """A row-parallel matrix followed by a norm of the whole output, as in Megatron-Bridge's Gemma 3.

    Attributes:
        beside: what is added to the matrix's output before the norm, from its input (an adapter); ``None`` for nothing.
    """

    def __init__(self, input_size: int, output_size: int, *, config: TransformerConfig, **given: object):
        super().__init__(input_size, output_size, config=config, **given)
        self.post_layernorm = RMSNorm(config, output_size, eps=config.layernorm_epsilon)
        self.beside: Callable[[Tensor], Tensor] | None = None

    def forward(self, inputs: Tensor) -> tuple[Tensor, Tensor | None]:
        output, bias = super().forward(inputs)
        if self.beside is not None:
            output = output + self.beside(inputs)
        return self.post_layernorm(output), bias


class GatedMLP(MLP):
    """megatron-core's gated MLP (Shazeer 2020, arXiv 2002.05202) without biases; with SiLU through :class:`SwiGLU`."""

    def __init__(self, config: DescribedConfig):
        last = NormedRowParallelLinear if config.described.after_norms else RowParallelLinear
        super().__init__(
            config,
            MLPSubmodules(linear_fc1=ColumnParallelLinear, linear_fc2=last),
            ffn_hidden_size=config.ffn_hidden_size,
            tp_group=parallel_state.get_tensor_model_parallel_group(),
        )

    def forward(self, hidden_states: Tensor, **_: object) -> tuple[Tensor, None]:
        """[tokens, batch, hidden_size] → the same, and the bias there is not."""
        gate_up, _ = self.linear_fc1(hidden_states)
        if self.activation_func is silu:
            return self.linear_fc2(SwiGLU.apply(gate_up))
        gate, up = gate_up.chunk(2, dim=-1)
        return self.linear_fc2(self.activation_func(gate) * up)


class SwiGLU(torch.autograd.Function):
    """``silu(gate) * up`` of [..., gate | up]; the gradients of both are written to where the matrix before them reads them.

    Of the forward pass only its input is kept. Autograd would keep two more parts of half its size, and would join the
    gradients with a copy. The numbers are the same to the bit.
    """

    @staticmethod
    def forward(ctx, gate_up: Tensor) -> Tensor:
        ctx.save_for_backward(gate_up)
        gate, up = gate_up.chunk(2, dim=-1)
        return silu(gate).mul_(up)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor) -> Tensor:
        (gate_up,) = ctx.saved_tensors
        gate, up = gate_up.chunk(2, dim=-1)
        both = torch.empty_like(gate_up)
        of_gate, of_up = both.chunk(2, dim=-1)
        torch.mul(grad, torch.ops.aten.silu.out(gate, out=of_up), out=of_up)
        torch.mul(grad, up, out=of_gate)
        torch.ops.aten.silu_backward.grad_input(of_gate, gate, grad_input=of_gate)
        return both


class CachingSelfAttention(SelfAttention):
    """megatron-core's self-attention whose cache holds rotated keys, in the order in which attention reads them.

    megatron-core's own caches them unrotated, [tokens, batch, KV groups, head_dim], where there is no flash-attention. Where
    layers differ, a layer has rotary positions of its own.
    """

    def __init__(self, config: DescribedConfig, *given: object, **named: object):
        super().__init__(config, *given, **named)
        self._frequencies = inverse_frequencies(config.described) if config.own_positions else None
        self._angles: Tensor | None = None

    def forward(self, hidden_states: Tensor, attention_mask: Tensor | None, *rest: object, **named: object):
        if self._frequencies is not None:
            length = len(named["rotary_pos_emb"])
            if self._angles is None or len(self._angles) < length:
                self._angles = angles(self._frequencies.to(hidden_states.device), length)[:, None, None]
            named["rotary_pos_emb"] = self._angles[:length]
        return super().forward(hidden_states, attention_mask, *rest, **named)

    def _adjust_key_value_for_inference(
        self, inference_context: BaseInferenceContext | None, query: Tensor, key: Tensor, value: Tensor, rotary_pos_emb, *rest
    ):
        if inference_context is None:
            return super()._adjust_key_value_for_inference(None, query, key, value, rotary_pos_emb, *rest)
        start = inference_context.sequence_len_offset
        end = start + key.shape[0]
        positions = rotary_pos_emb[0][start:end]
        key = apply_rotary_pos_emb(key, positions, config=self.config, cp_group=self.pg_collection.cp)
        caches = inference_context.key_value_memory_dict
        if self.layer_number not in caches:
            _, batch, groups, width = key.shape
            shape = (batch, groups, inference_context.max_sequence_length, width)
            caches[self.layer_number] = key.new_empty(shape), value.new_empty(shape)
        held = []
        for cache, new in zip(caches[self.layer_number], (key, value)):
            cache[:, :, start:end] = new.permute(1, 2, 0, 3)
            held.append(cache[:, :, :end].permute(2, 0, 1, 3))
        return query, *held, (positions, None), AttnMaskType.no_mask, None


class SdpaAttention(nn.Module):
    """Causal grouped-query attention through torch's ``scaled_dot_product_attention``, without dropout."""

    def __init__(self, config: TransformerConfig, *_: object, softmax_scale: float | None = None, **__: object):
        super().__init__()
        self._scale = softmax_scale
        self._window = None if config.window_size is None else config.window_size[0] + 1

    def forward(self, query: Tensor, key: Tensor, value: Tensor, *_: object, **__: object) -> Tensor:
        """Attend.

        Args:
            query: [tokens, batch, heads, head_dim], this rank's heads; the last tokens of the text.
            key, value: [tokens so far, batch, KV groups, head_dim].

        Returns:
            [tokens, batch, heads × head_dim].
        """
        tokens, batch = query.shape[:2]
        if tokens == 1:
            return self._decode(query, key, value)
        so_far = key.shape[0]
        query, key, value = (part.permute(1, 2, 0, 3) for part in (query, key, value))
        mask = None
        if tokens < so_far or (self._window is not None and self._window < so_far):
            mask = torch.ones(tokens, so_far, dtype=torch.bool, device=query.device).tril(so_far - tokens)
            if self._window is not None:
                mask = mask.triu(so_far - tokens + 1 - self._window)
        grouped = query.shape[1] != key.shape[1]
        context = scaled_dot_product_attention(
            query, key, value, attn_mask=mask, is_causal=mask is None, scale=self._scale, enable_gqa=grouped
        )
        return context.permute(2, 0, 1, 3).reshape(tokens, batch, -1)

    def _decode(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """One token's queries see every key of the window; those of a KV group go as rows of one matrix."""
        _, batch, heads, width = query.shape
        if self._window is not None:
            key, value = key[-self._window :], value[-self._window :]
        groups = key.shape[2]
        query = query.reshape(batch, groups, heads // groups, width)
        key, value = (part.permute(1, 2, 0, 3) for part in (key, value))
        return scaled_dot_product_attention(query, key, value, scale=self._scale).reshape(1, batch, heads * width)
