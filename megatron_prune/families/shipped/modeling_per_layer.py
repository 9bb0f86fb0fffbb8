"""Decoders whose layers have sizes of their own, built from the layers of the installed transformers.

``per_layer_config`` in ``config.json`` says, by the number of a layer, which sizes differ there, and which blocks it lacks:

    "per_layer_config": {"3": {"intermediate_size": 800, "num_key_value_heads": 2, "skip": ["attention"]}}

Load with ``AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)``. Everything else is transformers' own: the
model is its class of the ``model_type``, and only layers that differ are replaced, each by the same class at its own sizes.
"""

import contextlib
import copy

import torch
from torch import nn
from transformers.models.gemma3.modeling_gemma3 import Gemma3ForCausalLM, Gemma3TextModel
from transformers.models.llama.modeling_llama import LlamaForCausalLM, LlamaModel
from transformers.models.mistral.modeling_mistral import MistralForCausalLM, MistralModel
from transformers.models.qwen2.modeling_qwen2 import Qwen2ForCausalLM, Qwen2Model
from transformers.models.qwen3.modeling_qwen3 import Qwen3ForCausalLM, Qwen3Model


class NoAttention(nn.Module):
    """Stands where a layer has no attention, and adds nothing to the stream.

    It keeps one number a token in the cache, so that this layer's part of it is as long as the others': transformers
    asks a single layer, often the first, how many tokens a cache holds.
    """

    def __init__(self, replaced):
        super().__init__()
        self.layer_idx, self.is_sliding = replaced.layer_idx, getattr(replaced, "is_sliding", False)

    def forward(self, hidden_states, **kwargs):
        cache = kwargs.get("past_key_values", kwargs.get("cache"))
        if cache is not None:
            token = hidden_states.new_zeros(hidden_states.shape[0], 1, hidden_states.shape[1], 1)
            cache.update(token, token, self.layer_idx, {"cache_position": kwargs.get("cache_position")})
        return torch.zeros_like(hidden_states), None


class NoMLP(nn.Module):
    """Stands where a layer has no feed-forward block, and adds nothing to the stream."""

    def forward(self, hidden_states):
        return torch.zeros_like(hidden_states)


@contextlib.contextmanager
def alike(config):
    """Within, the configuration is one of layers that are alike; gives what differs, by the layer's number."""
    differing = config.to_dict().get("per_layer_config") or {}
    config.per_layer_config = None
    width = config.intermediate_size  # 0 where every layer says its own
    config.intermediate_size = width or 1
    try:
        yield {int(layer): dict(changes) for layer, changes in differing.items()}
    finally:
        config.intermediate_size, config.per_layer_config = width, differing


def own_layer(kind, config, layer_idx, changes):
    """A decoder layer of transformers' class ``kind`` at sizes of its own."""
    skip = changes.pop("skip", ())
    own = copy.copy(config)
    for name, value in changes.items():
        setattr(own, name, value)
    layer = kind(own, layer_idx)
    sandwich = hasattr(layer, "pre_feedforward_layernorm")  # norms before and after each block
    if "attention" in skip:
        layer.self_attn = NoAttention(layer.self_attn)
        remove(layer, "input_layernorm", *(["post_attention_layernorm"] if sandwich else []))
    if "mlp" in skip:
        layer.mlp = NoMLP()
        remove(
            layer, *(["pre_feedforward_layernorm", "post_feedforward_layernorm"] if sandwich else ["post_attention_layernorm"])
        )
    for part in layer.modules():
        if hasattr(part, "config"):
            part.config = config  # the model's, so that a change of the attention's implementation reaches every layer
    return layer


def remove(layer, *norms):
    """Take norms of a block that is not there out of a layer."""
    for norm in norms:
        setattr(layer, norm, nn.Identity())


class PerLayerModel:
    """Makes transformers' model without a head one whose layers differ."""

    _auto_class = "AutoModel"
    base_model_prefix = "model"  # Gemma 3's class of transformers 4 has none, and loses the weights

    def __init__(self, config):
        with alike(config) as differing:
            super().__init__(config)
            for layer_idx, changes in differing.items():
                self.layers[layer_idx] = own_layer(type(self.layers[layer_idx]), config, layer_idx, changes)
            self.post_init()


class PerLayerForCausalLM:
    """Makes transformers' model for causal language modelling one whose layers differ."""

    _auto_class = "AutoModelForCausalLM"
    base_model_prefix = "model"
    decoder = None

    def __init__(self, config):
        with alike(config):
            super().__init__(config)
        self.model = self.decoder(config)
        with alike(config):
            self.post_init()

    @classmethod
    def _can_set_attn_implementation(cls):
        """Every layer reads the model's configuration; transformers looks for that in this file, and would not find it."""
        return True

    def _get_static_cache_init_shape(self):
        """``None``: a static cache takes each layer's shape when it is first filled."""


class PerLayerGemma3TextModel(PerLayerModel, Gemma3TextModel):
    pass


class PerLayerLlamaModel(PerLayerModel, LlamaModel):
    pass


class PerLayerMistralModel(PerLayerModel, MistralModel):
    pass


class PerLayerQwen2Model(PerLayerModel, Qwen2Model):
    pass


class PerLayerQwen3Model(PerLayerModel, Qwen3Model):
    pass


class PerLayerGemma3ForCausalLM(PerLayerForCausalLM, Gemma3ForCausalLM):
    decoder = PerLayerGemma3TextModel


class PerLayerLlamaForCausalLM(PerLayerForCausalLM, LlamaForCausalLM):
    decoder = PerLayerLlamaModel


class PerLayerMistralForCausalLM(PerLayerForCausalLM, MistralForCausalLM):
    decoder = PerLayerMistralModel


class PerLayerQwen2ForCausalLM(PerLayerForCausalLM, Qwen2ForCausalLM):
    decoder = PerLayerQwen2Model


class PerLayerQwen3ForCausalLM(PerLayerForCausalLM, Qwen3ForCausalLM):
    decoder = PerLayerQwen3Model
