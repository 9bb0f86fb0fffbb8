"""The shape and the numerics of a decoder-only model, in Megatron's field names; sizes and numerics may differ by layer."""

from __future__ import annotations

import dataclasses
import functools
import math
import sys
from collections import Counter
from dataclasses import asdict, dataclass, fields
from typing import Any, Literal, Sequence

from megatron_prune.arch.blocks.block import BLOCKS, BlockKind, Role
from megatron_prune.errors import CheckpointError, InputError, reason
from megatron_prune.files.documents import shorten

MAX_SIZE = 2**31 - 1
"""The largest size that an index of 32 bits reaches; what is larger is a damaged file."""

MAX_LAYERS, MAX_HEADS = 2**14, 2**16
"""What is gone through one by one, long before there are weights that could contradict a size."""


@dataclass(frozen=True, kw_only=True, slots=True)
class RopeScaling:
    """Frequency scaling of the rotary embedding.

    Attributes:
        kind: ``"llama3"`` (Llama 3.1, arXiv 2407.21783, as in transformers' ``_compute_llama3_parameters``) or
            ``"linear"`` (Chen et al. 2023, arXiv 2306.15595: all frequencies divided by ``factor``).
    """

    kind: str
    factor: float
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_max_position_embeddings: int = 8192

    def __post_init__(self):
        check_fields(self, "rotary scaling")
        if self.kind not in ("llama3", "linear"):
            raise CheckpointError("rotary scaling", got=shorten(self.kind), needed="linear or llama3")
        if self.kind == "llama3" and self.low_freq_factor >= self.high_freq_factor:
            raise CheckpointError(
                "rotary scaling: low_freq_factor", got=self.low_freq_factor, needed=f"less than {self.high_freq_factor}"
            )


ACTIVATIONS = ("silu", "gelu_tanh")


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelConfig:
    """A dense decoder: its layers are made of ``blocks`` (``arch/blocks/``), each with RMSNorm before it.

    All sizes are full (not per rank) and count units; ``kv_channels`` (the head dimension) is explicit, since ``hidden_size``
    need not be ``num_attention_heads * kv_channels`` after pruning. A field of :data:`PER_LAYER` is one value, or a tuple of
    one for each layer where these differ (one that is the same in all is kept as one value). Query heads of a layer are a
    multiple of its KV groups; a layer without heads has no attention, one without channels no feed-forward block.

    Attributes:
        blocks: kinds of block that layers are made of, in order; sizes of others are 0.
        qkv_bias, qk_norm, after_norms: whether the roles with that trait are there.
        zero_centered_norms: a norm multiplies with one plus its weight (Megatron's ``layernorm_zero_centered_gamma``).
        rotary_base: of the rotary positions; ``None`` for attention without positions.
        activation: between gate and up: ``"silu"``, or ``"gelu_tanh"``.
        softmax_scale: of attention; ``None`` is 1 / √kv_channels, and that number becomes ``None``.
        scaled_embedding: the embedding's output is multiplied by √hidden_size, rounded to the dtype of the model.
        sliding_window: tokens that a token sees, itself among them; ``None`` for all before it.
    """

    num_layers: int
    hidden_size: int
    ffn_hidden_size: int | tuple[int, ...]
    num_attention_heads: int | tuple[int, ...]
    num_query_groups: int | tuple[int, ...]
    kv_channels: int
    vocab_size: int
    tie_embeddings: bool
    qkv_bias: bool = False
    qk_norm: bool = False
    norm_epsilon: float = 1e-6
    rotary_base: float | tuple[float | None, ...] | None = 10000.0
    rope_scaling: RopeScaling | tuple[RopeScaling | None, ...] | None = None
    max_position_embeddings: int = 2048
    sliding_window: int | tuple[int | None, ...] | None = None
    after_norms: bool = False
    zero_centered_norms: bool = False
    activation: Literal["silu", "gelu_tanh"] | tuple[str, ...] = "silu"
    softmax_scale: float | tuple[float | None, ...] | None = None
    scaled_embedding: bool = False
    blocks: tuple[str, ...] = ("attention", "gated")

    def __post_init__(self):
        check_fields(self, "the model's")
        for name, most in (("num_layers", MAX_LAYERS), ("num_attention_heads", MAX_HEADS)):
            if (largest := max(self.each(name))) > most:
                raise CheckpointError(f"the model's {name}", got=largest, needed=f"at most {most}")
        plain = lambda scale: scale is not None and math.isclose(scale, self.kv_channels**-0.5, rel_tol=1e-9)
        scales = tuple(None if plain(scale) else scale for scale in self.each("softmax_scale"))
        object.__setattr__(self, "softmax_scale", scales if len(scales) > 1 else scales[0])
        for name in PER_LAYER:  # one value where all are the same, so that equal models are equal
            values = getattr(self, name)
            if isinstance(values, tuple) and len(set(values)) == 1:
                object.__setattr__(self, name, values[0])
        object.__setattr__(self, "blocks", tuple(kind for kind in self.blocks if any(self.each(_size_field(kind)))))
        for layers, heads, groups in _distinct(self.num_layers, self.num_attention_heads, self.num_query_groups):
            if bool(heads) != bool(groups) or (groups and heads % groups):
                where = "" if len(layers) == self.num_layers else f" in layer {layers[0]}"
                raise CheckpointError(
                    f"the model's query heads do not divide evenly over its KV groups{where}",
                    got=f"{heads} heads, {groups} groups",
                    needed="a number of heads that is a multiple of the number of groups",
                )

    # ------------------------------------------------------------------------------------------------ layers

    def each(self, field: str) -> tuple:
        """A field's value in every layer (of a field that is one value: that alone)."""
        value = getattr(self, field)
        return value if isinstance(value, tuple) else (value,)

    def of_layer(self, layer: int | None) -> ModelConfig:
        """What is asked of one layer takes this: the same model, with the sizes and numerics of that layer in all of its layers.

        Where layers are alike (and outside of them: ``None``) it is the model's own.
        """
        return _of_layer(self, layer) if self.differing and layer is not None else self

    def of_layers(self, layers: Sequence[int]) -> ModelConfig:
        """The model of these layers alone, in this order."""
        values = {name: tuple(getattr(self, name)[layer] for layer in layers) for name in self.differing}
        return dataclasses.replace(self, num_layers=len(layers), **values)

    @property
    def first_rotary_base(self) -> float:
        """Rotary base of the first layer that has positions; the usual one where none has."""
        return next((base for base in self.each("rotary_base") if base), 10000.0)

    @property
    def differing(self) -> tuple[str, ...]:
        """Fields in which layers differ."""
        return tuple(name for name in PER_LAYER if isinstance(getattr(self, name), tuple))

    @property
    def is_uniform(self) -> bool:
        """Whether all layers have the same shape."""
        return not set(self.differing) & {"ffn_hidden_size", "num_attention_heads", "num_query_groups"}

    def uniform(self, field: str) -> Any:
        """The value that a field has in every layer.

        Raises:
            InputError: naming the layers, if they differ.
        """
        value = getattr(self, field)
        if isinstance(value, tuple):
            most = Counter(value).most_common(1)[0][0]
            others = [f"{other} in layer {layer}" for layer, other in enumerate(value) if other != most]
            more = f" and {len(others) - 8} more" if len(others) > 8 else ""
            raise InputError(
                f"{field} is not one number for the model: layers differ",
                got=f"{most}, but {', '.join(others[:8])}{more}",
                needed="a model whose layers are alike, or sizes by layer",
                do="name sizes with --layer-sizes, or, within a budget, have them chosen with --allocate free",
            )
        return value

    # ------------------------------------------------------------------------------------------------ sizes

    def units(self, axis: str) -> int:
        """Units of an axis in every layer (of a whole model: layers, residual channels or tokens).

        Raises:
            InputError: naming the layers, if they differ: ask :meth:`of_layer`.
        """
        return self.uniform(FIELDS[axis])

    def size(self, space: str) -> int:
        """Elements of a space (``arch/blocks``), as :meth:`units`."""
        if space == "head_dim":
            return self.kv_channels
        return self.units(space) * (self.kv_channels if space in ("head", "kv_head") else 1)

    @property
    def heads_per_group(self) -> int:
        """Query heads that share one key/value head, in every layer; 0 where there are none."""
        heads, groups = self.units("head"), self.units("kv_head")
        return heads // groups if groups else 0

    @property
    def dims(self) -> dict[str, int]:
        """Size in elements of every space, where layers are alike."""
        return {space: self.size(space) for space in ("vocab", "hidden", "ffn", "head", "kv_head", "head_dim")}

    @property
    def norm_offset(self) -> float:
        """What is added to a norm's weight before it multiplies."""
        return 1.0 if self.zero_centered_norms else 0.0

    @property
    def kinds(self) -> tuple[BlockKind, ...]:
        """The blocks that this layer (or every layer, where they are alike) has."""
        return _kinds(self)

    def block_of(self, axis: str) -> BlockKind:
        """The block of this layer that is cut along an axis.

        Raises:
            StopIteration: if it has none.
        """
        return next(kind for kind in self.kinds if axis in kind.axes)

    def roles(self, kind: BlockKind) -> tuple[Role, ...]:
        """The roles of a block that this model has."""
        return tuple(role for role in kind.roles if not role.trait or getattr(self, role.trait))

    # ------------------------------------------------------------------------------------------------ files

    def to_json(self) -> dict[str, Any]:
        """A dictionary of plain values; :meth:`from_json` is its inverse. What was not there in version 1 stands only where used."""
        found = asdict(self)
        later = {item.name: item.default for item in fields(self) if item.name in _LATER}
        return {name: value for name, value in found.items() if name not in later or value != later[name]}

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> ModelConfig:
        """Rebuild from :meth:`to_json`.

        Raises:
            CheckpointError: on a missing or unknown key, or a size that is not a positive integer.
        """
        scaling = lambda entry: RopeScaling(**entry) if entry else None
        try:
            given = {name: tuple(value) if isinstance(value, list) else value for name, value in data.items()}
            several = given.get("rope_scaling")
            given["rope_scaling"] = tuple(map(scaling, several)) if isinstance(several, tuple) else scaling(several)
            return cls(**given)
        except (TypeError, AttributeError) as error:
            raise CheckpointError("a stored model description cannot be read", got=reason(error)) from None


PER_LAYER = {
    "ffn_hidden_size": "size",
    "num_attention_heads": "size",
    "num_query_groups": "size",
    "rotary_base": "float | None",
    "rope_scaling": "RopeScaling | None",
    "sliding_window": "int | None",
    "activation": "Literal",
    "softmax_scale": "float | None",
}
"""Fields of :class:`ModelConfig` that may differ by layer → the kind of one layer's value (:func:`check_value`)."""

FIELDS = {
    "hidden": "hidden_size",
    "ffn": "ffn_hidden_size",
    "head": "num_attention_heads",
    "kv_head": "num_query_groups",
    "layer": "num_layers",
    "vocab": "vocab_size",
}
"""Axis → the field of :class:`ModelConfig` that counts its units."""

_LATER = ("after_norms", "zero_centered_norms", "activation", "softmax_scale", "scaled_embedding", "blocks")


@functools.lru_cache(maxsize=1 << 16)
def _of_layer(config: ModelConfig, layer: int) -> ModelConfig:
    values = {name: getattr(config, name)[layer] for name in config.differing}
    blocks = tuple(kind for kind in config.blocks if values.get(field := _size_field(kind), getattr(config, field)))
    return dataclasses.replace(config, **values, blocks=blocks)


@functools.lru_cache(maxsize=1 << 14)
def _kinds(config: ModelConfig) -> tuple[BlockKind, ...]:
    return tuple(kind for kind in map(BLOCKS.get, config.blocks) if config.size(kind.inside_space))


@functools.cache
def _size_field(kind: str) -> str:
    """The field that is 0 where a block of that kind is not there."""
    return FIELDS[BLOCKS.get(kind).axes[0]]


def _distinct(layers: int, *values: Any) -> list[tuple[list[int], Any, Any]]:
    """(layers, values) for every combination of values that layers have."""
    columns = [value if isinstance(value, tuple) else (value,) * layers for value in values]
    found: dict[tuple, list[int]] = {}
    for layer, combination in enumerate(zip(*columns)) if any(isinstance(v, tuple) for v in values) else [(0, values)]:
        found.setdefault(combination, []).append(layer)
    if len(found) == 1:
        found = {combination: list(range(layers)) for combination in found}
    return [(numbers, *combination) for combination, numbers in found.items()]


def value_kinds() -> dict[str, str]:
    """Field of :class:`ModelConfig` → the kind of its value where all layers have the same (:func:`check_value`)."""
    return {item.name: PER_LAYER.get(item.name, item.type).replace("size", "int") for item in fields(ModelConfig)}


def check_fields(described: ModelConfig | RopeScaling, what: str) -> None:
    """Refuse a field whose value no model can have.

    Raises:
        CheckpointError: naming the first.
    """
    for field in fields(described):
        value, kind = getattr(described, field.name), field.type
        if isinstance(described, ModelConfig) and field.name in PER_LAYER:
            kind = PER_LAYER[field.name]
            if isinstance(value, tuple):
                if len(value) != described.num_layers:
                    raise CheckpointError(f"{what} {field.name}", got=f"{len(value)} layers", needed=str(described.num_layers))
                for layer, one in enumerate(value):
                    check_value(kind, one, f"{what} {field.name} in layer {layer}")
                continue
        check_value(
            "int" if kind == "size" and (value or _is_there(described, field.name)) else kind, value, f"{what} {field.name}"
        )


def _is_there(config: ModelConfig, field: str) -> bool:
    """Whether the model has blocks that a field counts units of."""
    return any(FIELDS[axis] == field for name in config.blocks for axis in BLOCKS.get(name).axes)


def check_value(kind: str, value: Any, what: str) -> None:
    """Refuse a value that is no count from 1 on (``int``) or from 0 on (``size``), no positive number (``float``), no ``bool``,
    or no word of a ``Literal``; ``… | None`` may be ``None``.

    Raises:
        CheckpointError: beginning with ``what``.
    """
    if kind.endswith(" | None"):
        if value is None:
            return
        kind = kind.removesuffix(" | None")
    whole = isinstance(value, int) and not isinstance(value, bool)
    if kind in ("int", "size") and not (whole and (kind == "int") <= value <= MAX_SIZE):
        raise CheckpointError(what, got=shorten(value), needed=f"a positive whole number of at most {MAX_SIZE}")
    number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if kind == "float" and not (number and 0 < value <= sys.float_info.max):
        raise CheckpointError(what, got=shorten(value), needed="a positive, finite number")
    if kind == "bool" and not isinstance(value, bool):
        raise CheckpointError(what, got=shorten(value), needed="true or false")
    if kind == "RopeScaling" and not isinstance(value, RopeScaling):
        raise CheckpointError(what, got=shorten(value), needed="a scaling of the rotary embedding")
    if kind.startswith("tuple") and not (isinstance(value, tuple) and value and set(value) <= set(BLOCKS.names())):
        raise CheckpointError(what, got=shorten(value), needed="some of " + ", ".join(BLOCKS.names()))
    if kind.startswith("Literal") and value not in ACTIVATIONS:
        raise CheckpointError(what, got=shorten(value), needed="one of " + ", ".join(ACTIVATIONS))


SHAPE_FIELDS = (
    "num_layers",
    "hidden_size",
    "ffn_hidden_size",
    "num_attention_heads",
    "num_query_groups",
    "kv_channels",
    "vocab_size",
)
"""The fields of :class:`ModelConfig` that say a model's shape, in the order in which they are shown."""
