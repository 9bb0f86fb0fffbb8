"""What a family is: its Hugging Face tensor names and configuration fields, and ours, in one table."""

from __future__ import annotations

import re
from dataclasses import dataclass, field, fields
from typing import Any, Callable

from megatron_prune.arch.model import ModelConfig, RopeScaling
from megatron_prune.arch.tensors import TensorId
from megatron_prune.errors import CheckpointError, InputError
from megatron_prune.registry import Registry

FAMILIES: Registry[Family] = Registry("model family", "megatron_prune.families")

NAMES = {
    "embedding": "model.embed_tokens.weight",
    "input_norm": "model.layers.{layer}.input_layernorm.weight",
    "q": "model.layers.{layer}.self_attn.q_proj.weight",
    "k": "model.layers.{layer}.self_attn.k_proj.weight",
    "v": "model.layers.{layer}.self_attn.v_proj.weight",
    "o": "model.layers.{layer}.self_attn.o_proj.weight",
    "post_norm": "model.layers.{layer}.post_attention_layernorm.weight",
    "gate": "model.layers.{layer}.mlp.gate_proj.weight",
    "up": "model.layers.{layer}.mlp.up_proj.weight",
    "down": "model.layers.{layer}.mlp.down_proj.weight",
    "final_norm": "model.norm.weight",
    "output": "lm_head.weight",
}
"""Tensor names that Llama introduced and the families after it kept."""

FIELDS = {
    "num_layers": "num_hidden_layers",
    "hidden_size": "hidden_size",
    "ffn_hidden_size": "intermediate_size",
    "num_attention_heads": "num_attention_heads",
    "num_query_groups": "num_key_value_heads",
    "kv_channels": "head_dim",
    "vocab_size": "vocab_size",
    "norm_epsilon": "rms_norm_eps",
    "max_position_embeddings": "max_position_embeddings",
    "tie_embeddings": "tie_word_embeddings",
}
"""Our field of :class:`ModelConfig` ↔ the key in ``config.json``, the same in all families so far."""

BUFFERS = re.compile(r"model\.layers\.\d+\.self_attn\.rotary_emb\.inv_freq")
"""Rotary tables that old checkpoints store and transformers computes anew."""


@dataclass(frozen=True, kw_only=True)
class Family:
    """One Hugging Face model family.

    Attributes:
        name: its ``model_type``.
        architecture: its class for causal language modelling in transformers.
        names: role → tensor name, ``{layer}`` standing for the 0-based layer.
        defaults: values transformers assumes for keys that ``config.json`` leaves out.
        qkv_bias, qk_norm: what its attention always has (a key of the configuration cannot say).
        required: keys that must have this value, since nothing here expresses another.
        heads_divide_hidden: transformers' class refuses ``hidden_size % num_attention_heads != 0``.
        window: the sliding window in tokens that a ``config.json`` means, ``None`` for full attention.
    """

    name: str
    architecture: str
    names: dict[str, str] = field(default_factory=lambda: dict(NAMES))
    defaults: dict[str, Any] = field(default_factory=dict)
    qkv_bias: bool = False
    qk_norm: bool = False
    required: dict[str, tuple] = field(default_factory=dict)
    heads_divide_hidden: bool = False
    window: Callable[[dict[str, Any]], int | None] = lambda config: None

    def tensor_name(self, tensor: TensorId) -> str:
        """Hugging Face's name of a tensor."""
        return self.names[tensor.role].format(layer=tensor.layer)

    def model_config(self, hf: dict[str, Any]) -> ModelConfig:
        """Read ``config.json``.

        Raises:
            CheckpointError: on a missing key, or a feature that this project does not carry.
        """
        if hf.get("quantization_config"):
            raise CheckpointError("config.json has a quantization_config", needed="plain weights (fp32, bf16 or fp16)")
        merged = {**self.defaults, **{key: value for key, value in hf.items() if value is not None}}
        for key in ("num_key_value_heads", "head_dim"):
            if key in hf and hf[key] is None:
                merged.pop(key, None)  # null: the same as the query heads, or hidden size / heads
        for key, allowed in {**_REQUIRED, **self.required}.items():
            if key in merged and merged[key] not in allowed:
                raise CheckpointError(
                    f"config.json of a {self.name} model: {key}", got=repr(merged[key]), needed=f"one of {list(allowed)}"
                )
        missing = [key for key in _NEEDED if key not in merged]
        if missing:
            raise CheckpointError("config.json lacks " + ", ".join(missing), do="is this a model's config.json?")
        for key in (*_NEEDED, "num_key_value_heads", "head_dim"):
            if key in merged and (isinstance(merged[key], bool) or not isinstance(merged[key], int) or merged[key] < 1):
                raise CheckpointError(f"config.json: {key}", got=repr(merged[key]), needed="a positive whole number")
        merged.setdefault("num_key_value_heads", merged["num_attention_heads"])
        merged.setdefault("head_dim", merged["hidden_size"] // max(1, merged["num_attention_heads"]))
        try:
            base, scaling = _read_rope(merged)
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise CheckpointError("config.json: the rotary embedding's entries are damaged", got=repr(error)) from None
        values = {ours: merged[theirs] for ours, theirs in FIELDS.items()}
        return ModelConfig(
            **values,
            qkv_bias=self.qkv_bias,
            qk_norm=self.qk_norm,
            rotary_base=base,
            rope_scaling=scaling,
            sliding_window=self.window(hf),
        )

    def hf_config(self, config: ModelConfig, template: dict[str, Any] | None, kept_layers: list[int] | None = None) -> dict:
        """``config.json`` for a model of this family.

        Args:
            config: the model to describe.
            template: the ``config.json`` it descends from; keys that need no change keep value and order.
            kept_layers: original layers that remain, to cut per-layer lists such as ``layer_types``.
        """
        self.check_expressible(config)
        hf = dict(template) if template else self._fresh(config)
        if template and template.get("model_type") != self.name:
            hf.update(model_type=self.name, architectures=[self.architecture], sliding_window=config.sliding_window)
        # Only what would be read otherwise is written, so that an unchanged model keeps its file as it was.
        # Keys that are left out follow from others, so the file is read again until nothing differs.
        while wrong := self._differing(hf, config):
            hf.update({FIELDS[ours]: getattr(config, ours) for ours in wrong})
        read, fresh = self.model_config(hf), self._fresh(config)
        if (read.rotary_base, read.rope_scaling) != (config.rotary_base, config.rope_scaling):
            hf.pop("rope_parameters", None)
            hf.update({key: fresh.get(key) for key in ("rope_theta", "rope_scaling")})
        if read.sliding_window != config.sliding_window:
            hf["sliding_window"] = config.sliding_window
        if isinstance(hf.get("layer_types"), list):
            hf["layer_types"] = _layer_types(hf["layer_types"], config.num_layers, kept_layers)
        return hf

    def _differing(self, hf: dict[str, Any], config: ModelConfig) -> list[str]:
        """Fields that a ``config.json`` would give other values than ``config`` has."""
        read = self.model_config(hf)
        return [ours for ours in FIELDS if getattr(read, ours) != getattr(config, ours)]

    def check_expressible(self, config: ModelConfig) -> None:
        """Refuse a model that transformers' configuration class of this family refuses or cannot describe.

        Raises:
            InputError: naming the families whose class can say it.
        """
        heads, hidden = config.num_attention_heads, config.hidden_size
        if self.heads_divide_hidden and hidden % heads:
            below = hidden - hidden % heads
            raise InputError(
                f"transformers' {self.architecture} cannot express hidden_size {hidden} with {heads} attention heads",
                needed=f"a hidden size that is a multiple of {heads} ({below} or {below + heads})",
                do="choose such a size, or write the model as a family whose class can say it: " + self._able(config),
            )
        if (read := self.model_config(self._fresh(config))) != config:
            lost = [f.name for f in fields(config) if getattr(read, f.name) != getattr(config, f.name)]
            raise InputError(
                f"transformers' {self.architecture} cannot express this model's {', '.join(lost)}",
                do="write it as a family whose class can: " + self._able(config),
            )

    def _able(self, config: ModelConfig) -> str:
        """Flags that name the families of this architecture which can describe ``config``."""
        able = []
        for name in self.kin():
            family = FAMILIES.get(name)
            divides = not family.heads_divide_hidden or config.hidden_size % config.num_attention_heads == 0
            if divides and family.model_config(family._fresh(config)) == config:
                able.append(f"--target-family {name}")
        return ", ".join(able) or "there is none"

    def kin(self) -> list[str]:
        """Families of the same architecture (tensors, biases, norms), to which a model can be moved."""
        same = lambda other: (other.names, other.qkv_bias, other.qk_norm) == (self.names, self.qkv_bias, self.qk_norm)
        return [name for name in FAMILIES.names() if same(FAMILIES.get(name))]

    def _fresh(self, config: ModelConfig) -> dict[str, Any]:
        hf: dict[str, Any] = {"architectures": [self.architecture], "model_type": self.name, "hidden_act": "silu"}
        hf.update({theirs: getattr(config, ours) for ours, theirs in FIELDS.items()})
        hf["rope_theta"] = config.rotary_base
        scaling = config.rope_scaling
        if scaling and scaling.kind == "llama3":
            hf["rope_scaling"] = {
                "rope_type": "llama3",
                "factor": scaling.factor,
                "low_freq_factor": scaling.low_freq_factor,
                "high_freq_factor": scaling.high_freq_factor,
                "original_max_position_embeddings": scaling.original_max_position_embeddings,
            }
        elif scaling:
            hf["rope_scaling"] = {"rope_type": scaling.kind, "factor": scaling.factor}
        if config.sliding_window is not None or self.name == "mistral":
            hf["sliding_window"] = config.sliding_window
        return hf


def _layer_types(types: list, layers: int, kept: list[int] | None) -> list:
    """The kind of every layer that remains."""
    if len(types) == layers:
        return types
    if kept is not None and max(kept) < len(types):
        return [types[layer] for layer in kept]
    if len(set(types)) == 1:
        return types[:1] * layers
    raise InputError(f"config.json lists {len(types)} layer_types of several kinds", needed=f"{layers}, one for each layer")


_NEEDED = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
_REQUIRED = {
    "hidden_act": ("silu", "swish"),
    "attention_bias": (False,),
    "mlp_bias": (False,),
    "partial_rotary_factor": (1, 1.0),
}


def family_of(hf: dict[str, Any]) -> Family:
    """The family that ``config.json`` names.

    Raises:
        CheckpointError: if it names none, or one that is not supported.
    """
    model_type = hf.get("model_type")
    if model_type not in FAMILIES.names():
        raise CheckpointError(
            "config.json is of a family that is not supported", got=repr(model_type), needed=", ".join(FAMILIES.names())
        )
    return FAMILIES.get(model_type)


def family_for(config: ModelConfig) -> Family:
    """The plainest family that can hold ``config``: for Megatron checkpoints that do not name theirs."""
    for name in ("llama", "mistral", "qwen2", "qwen3"):
        family = FAMILIES.get(name)
        fits = (family.qkv_bias, family.qk_norm) == (config.qkv_bias, config.qk_norm)
        if fits and not (family.heads_divide_hidden and config.hidden_size % config.num_attention_heads):
            if config.sliding_window is None or name == "mistral":
                return family
    raise CheckpointError("no supported Hugging Face family has this architecture", got=config)


def _read_rope(merged: dict[str, Any]) -> tuple[float, RopeScaling | None]:
    """Rotary base and scaling from ``rope_parameters`` (transformers 5) or ``rope_theta`` and ``rope_scaling``."""
    rope = merged.get("rope_parameters") or merged.get("rope_scaling") or {}
    base = rope.get("rope_theta", merged.get("rope_theta", 10000.0))
    base = float(base)
    kind = rope.get("rope_type", rope.get("type", "default"))
    if rope.get("partial_rotary_factor", 1.0) != 1.0:
        raise CheckpointError("config.json: rotary positions on a part of the head", needed="partial_rotary_factor 1.0")
    if kind == "default":
        return base, None
    if kind == "linear":
        return base, RopeScaling(kind="linear", factor=float(rope["factor"]))
    if kind == "llama3":
        return base, RopeScaling(
            kind="llama3",
            factor=float(rope["factor"]),
            low_freq_factor=float(rope["low_freq_factor"]),
            high_freq_factor=float(rope["high_freq_factor"]),
            original_max_position_embeddings=int(rope["original_max_position_embeddings"]),
        )
    raise CheckpointError("config.json: rope scaling", got=repr(kind), needed="default, linear or llama3")
