"""The shape and the numerics of a decoder-only model, in Megatron's field names."""

from __future__ import annotations

import sys
from dataclasses import asdict, dataclass, fields
from typing import Any

from megatron_prune.errors import CheckpointError, reason
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


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelConfig:
    """A dense decoder: RMSNorm, rotary positions, gated SiLU feed-forward, grouped-query attention.

    All sizes are full (not per rank) and count elements. ``num_attention_heads`` is a multiple of
    ``num_query_groups``; ``kv_channels`` (the head dimension) is explicit, since ``hidden_size`` need not be
    ``num_attention_heads * kv_channels`` after pruning.
    """

    num_layers: int
    hidden_size: int
    ffn_hidden_size: int
    num_attention_heads: int
    num_query_groups: int
    kv_channels: int
    vocab_size: int
    tie_embeddings: bool
    qkv_bias: bool = False
    qk_norm: bool = False
    norm_epsilon: float = 1e-6
    rotary_base: float = 10000.0
    rope_scaling: RopeScaling | None = None
    max_position_embeddings: int = 2048
    sliding_window: int | None = None

    def __post_init__(self):
        check_fields(self, "the model's")
        for name, most in (("num_layers", MAX_LAYERS), ("num_attention_heads", MAX_HEADS)):
            if getattr(self, name) > most:
                raise CheckpointError(f"the model's {name}", got=getattr(self, name), needed=f"at most {most}")
        if self.num_attention_heads % self.num_query_groups:
            raise CheckpointError(
                "the model's query heads do not divide evenly over its KV groups",
                got=f"{self.num_attention_heads} heads, {self.num_query_groups} groups",
                needed="a number of heads that is a multiple of the number of groups",
            )

    @property
    def heads_per_group(self) -> int:
        """Query heads that share one key/value head."""
        return self.num_attention_heads // self.num_query_groups

    @property
    def dims(self) -> dict[str, int]:
        """Size in elements of every labelled tensor dimension (labels as in ``arch/tensors.py``)."""
        return {
            "vocab": self.vocab_size,
            "hidden": self.hidden_size,
            "ffn": self.ffn_hidden_size,
            "head": self.num_attention_heads * self.kv_channels,
            "kv_head": self.num_query_groups * self.kv_channels,
            "head_dim": self.kv_channels,
        }

    def to_json(self) -> dict[str, Any]:
        """A dictionary of plain values; :meth:`from_json` is its inverse."""
        return asdict(self)

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> ModelConfig:
        """Rebuild from :meth:`to_json`.

        Raises:
            CheckpointError: on a missing or unknown key, or a size that is not a positive integer.
        """
        try:
            scaling = data.get("rope_scaling")
            return cls(**{**data, "rope_scaling": RopeScaling(**scaling) if scaling else None})
        except (TypeError, AttributeError) as error:
            raise CheckpointError("a stored model description cannot be read", got=reason(error)) from None


def check_fields(described: ModelConfig | RopeScaling, what: str) -> None:
    """Refuse a field whose value no model can have.

    Raises:
        CheckpointError: naming the first.
    """
    for field in fields(described):
        check_value(field.type, getattr(described, field.name), f"{what} {field.name}")


def check_value(kind: str, value: Any, what: str) -> None:
    """Refuse a value that is no size (``int``), no positive number (``float``) or no ``bool``; ``… | None`` may be ``None``.

    Raises:
        CheckpointError: beginning with ``what``.
    """
    if kind.endswith(" | None"):
        if value is None:
            return
        kind = kind.removesuffix(" | None")
    if kind == "int" and (isinstance(value, bool) or not isinstance(value, int) or not 1 <= value <= MAX_SIZE):
        raise CheckpointError(what, got=shorten(value), needed=f"a positive whole number of at most {MAX_SIZE}")
    number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if kind == "float" and not (number and 0 < value <= sys.float_info.max):
        raise CheckpointError(what, got=shorten(value), needed="a positive, finite number")
    if kind == "bool" and not isinstance(value, bool):
        raise CheckpointError(what, got=shorten(value), needed="true or false")


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
