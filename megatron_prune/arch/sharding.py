"""Megatron's tensors: which role rows they fuse, and which block of them a tensor-parallel rank holds.

Layouts (Megatron-LM, ``spec`` in docs/formats.md); h hidden, d head dim, n query heads per group, T ranks:

========================  ===============================================  ==================================
tensor                    full rows, in order                              rank r of T holds
========================  ===============================================  ==================================
``word_embeddings``       vocabulary, then padding                         an equal range of rows
``linear_qkv``            per KV group: n·d of q, d of k, d of v           an equal range of rows
``linear_fc1``            all of gate, then all of up                      rows of gate, then the same of up
``linear_proj, _fc2``     h                                                a range of columns
norms                     h or d                                           everything
========================  ===============================================  ==================================

With KV groups divisible by T the equal range of ``linear_qkv`` rows is whole groups; with fewer groups than ranks it
is not, and megatron-core gathers the rows at run time (``attention.py``).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Iterator, Literal, NamedTuple

from megatron_prune.arch.model import ModelConfig
from megatron_prune.arch.tensors import layer_roles, tensor_shape
from megatron_prune.errors import InputError, raise_all
from megatron_prune.files.documents import shorten

_LARGEST = 1 << 20
"""Ranks, stages, or rows that a vocabulary is padded to a multiple of."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ParallelLayout:
    """How a checkpoint is divided: tensor- and pipeline-parallel sizes, and the vocabulary's padding rule."""

    tensor: int = 1
    pipeline: int = 1
    vocab_divisible_by: int = 128

    def __post_init__(self):
        for name in ("tensor", "pipeline", "vocab_divisible_by"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise InputError(f"parallel layout: {name}", got=shorten(value), needed="a positive integer")
            if value > _LARGEST:
                raise InputError(f"parallel layout: {name}", got=shorten(value), needed=f"at most {_LARGEST}")

    def padded_vocab(self, vocab_size: int) -> int:
        """Rows of the embedding with padding (``megatron/training/tokenizer``: a multiple of divisible_by × T)."""
        multiple = self.vocab_divisible_by * self.tensor
        return -(-vocab_size // multiple) * multiple

    def stage_layers(self, stage: int, num_layers: int) -> range:
        """Global 0-based layers of pipeline ``stage``."""
        each = num_layers // self.pipeline
        return range(stage * each, (stage + 1) * each)

    def stage_of(self, layer: int, num_layers: int) -> int:
        """Pipeline stage that holds a global layer."""
        return layer // (num_layers // self.pipeline)

    def check(self, config: ModelConfig, what: str = "the model") -> None:
        """Refuse a layout that does not divide ``config``.

        Raises:
            InputError: naming each size that does not divide, and the tensor-parallel sizes that would.
        """
        problems = _tensor_problems(config, self.tensor)
        if config.num_layers % self.pipeline:
            legal = [p for p in range(1, config.num_layers + 1) if config.num_layers % p == 0]
            problems.append(f"{config.num_layers} layers do not divide over {self.pipeline} pipeline stages; legal: {legal}")
        legal = legal_tensor_sizes(config)
        raise_all(
            InputError,
            f"{what} does not divide over TP {self.tensor} × PP {self.pipeline}",
            problems,
            do=f"use a tensor-parallel size out of {legal} and a pipeline size that divides {config.num_layers}",
        )


def legal_tensor_sizes(config: ModelConfig) -> list[int]:
    """Tensor-parallel sizes that divide the model."""
    return [size for size in range(1, config.num_attention_heads + 1) if not _tensor_problems(config, size)]


def _tensor_problems(config: ModelConfig, tensor: int) -> list[str]:
    problems = []
    heads, groups = config.num_attention_heads, config.num_query_groups
    if heads % tensor:
        problems.append(f"{heads} attention heads do not divide over {tensor} ranks")
    if groups % tensor and tensor % groups:
        problems.append(f"{groups} KV groups neither divide over {tensor} ranks nor divide their number")
    if (heads + 2 * groups) * config.kv_channels % tensor:
        problems.append(f"{(heads + 2 * groups) * config.kv_channels} fused QKV rows do not divide over {tensor} ranks")
    if config.ffn_hidden_size % tensor:
        problems.append(f"{config.ffn_hidden_size} FFN channels do not divide over {tensor} ranks")
    return problems


class Span(NamedTuple):
    """``size`` consecutive fused rows that are rows ``start…`` of a role tensor (``role`` None: padding)."""

    role: str | None
    start: int
    size: int


@dataclass(frozen=True, kw_only=True, slots=True)
class MegatronTensor:
    """One tensor of a Megatron checkpoint.

    Attributes:
        name: its name inside a layer (or the model), as Transformer Engine's layers call it; distributed
            checkpoints always use this one.
        local_name: its name in megatron-core's local layers.
        roles: the role tensors fused in it.
        split: how ranks share it: equal ``rows``, ``gated`` halves of rows, ``cols``, or ``none`` (replicated).
    """

    name: str
    local_name: str
    roles: tuple[str, ...]
    split: Literal["rows", "gated", "cols", "none"]

    @property
    def axis(self) -> str:
        """The axis along which ranks share it (``""`` when replicated)."""
        if self.split == "none":
            return ""
        return {"q": "kv_head", "q_bias": "kv_head", "o": "kv_head", "embedding": "vocab", "output": "vocab"}.get(
            self.roles[0], "ffn"
        )

    def full_shape(self, config: ModelConfig, layout: ParallelLayout) -> tuple[int, ...]:
        """Shape over all ranks, vocabulary padding included."""
        if self.axis == "vocab":
            return (layout.padded_vocab(config.vocab_size), config.hidden_size)
        shapes = [tensor_shape(role, config) for role in self.roles]
        return (sum(shape[0] for shape in shapes), *shapes[0][1:])

    def spans(self, config: ModelConfig, rows: int) -> Iterator[Span]:
        """Role rows of the full tensor's ``rows`` rows, in order."""
        if len(self.roles) == 3:
            query, key, value = self.roles
            d, n = config.kv_channels, config.heads_per_group
            for group in range(config.num_query_groups):
                yield Span(query, group * n * d, n * d)
                yield Span(key, group * d, d)
                yield Span(value, group * d, d)
            return
        used = 0
        for role in self.roles:
            size = tensor_shape(role, config)[0]
            yield Span(role, 0, size)
            used += size
        if rows > used:
            yield Span(None, 0, rows - used)


_QKV = "self_attention.linear_qkv."
_LAYER_TENSORS = (
    MegatronTensor(name=_QKV + "layer_norm_weight", local_name="input_layernorm.weight", roles=("input_norm",), split="none"),
    MegatronTensor(name=_QKV + "weight", local_name=_QKV + "weight", roles=("q", "k", "v"), split="rows"),
    MegatronTensor(name=_QKV + "bias", local_name=_QKV + "bias", roles=("q_bias", "k_bias", "v_bias"), split="rows"),
    MegatronTensor(
        name="self_attention.q_layernorm.weight",
        local_name="self_attention.q_layernorm.weight",
        roles=("q_norm",),
        split="none",
    ),
    MegatronTensor(
        name="self_attention.k_layernorm.weight",
        local_name="self_attention.k_layernorm.weight",
        roles=("k_norm",),
        split="none",
    ),
    MegatronTensor(
        name="self_attention.linear_proj.weight", local_name="self_attention.linear_proj.weight", roles=("o",), split="cols"
    ),
    MegatronTensor(
        name="mlp.linear_fc1.layer_norm_weight", local_name="pre_mlp_layernorm.weight", roles=("post_norm",), split="none"
    ),
    MegatronTensor(name="mlp.linear_fc1.weight", local_name="mlp.linear_fc1.weight", roles=("gate", "up"), split="gated"),
    MegatronTensor(name="mlp.linear_fc2.weight", local_name="mlp.linear_fc2.weight", roles=("down",), split="cols"),
)


def _outer(name: str, role: str, split: str) -> MegatronTensor:
    return MegatronTensor(name=name, local_name=name, roles=(role,), split=split)


EMBEDDING = _outer("embedding.word_embeddings.weight", "embedding", "rows")
FINAL_NORM = _outer("decoder.final_layernorm.weight", "final_norm", "none")
OUTPUT = _outer("output_layer.weight", "output", "rows")


def layer_tensors(config: ModelConfig) -> list[MegatronTensor]:
    """The Megatron tensors of every layer of this model."""
    present = set(layer_roles(config))
    return [tensor for tensor in _LAYER_TENSORS if tensor.roles[0] in present]


def outer_tensors(config: ModelConfig) -> list[MegatronTensor]:
    """The Megatron tensors outside the layers."""
    return [EMBEDDING, FINAL_NORM] + ([] if config.tie_embeddings else [OUTPUT])


class Shard(NamedTuple):
    """What one rank holds of a full tensor: these row ranges one after the other, and this column range."""

    rows: tuple[range, ...]
    cols: range

    @property
    def shape(self) -> tuple[int, int]:
        """Rows and columns (a vector counts one column)."""
        return sum(len(part) for part in self.rows), len(self.cols)


def rank_ranges(sizes: list[int]) -> list[range]:
    """Consecutive ranges of the given sizes: what each rank holds of something split in order."""
    ranges, start = [], 0
    for size in sizes:
        ranges.append(range(start, start + size))
        start += size
    return ranges


def shard(tensor: MegatronTensor, full_shape: tuple[int, ...], ranks: int, rank: int, sizes: list[int] | None = None) -> Shard:
    """Block of ``tensor`` that ``rank`` of ``ranks`` holds.

    Args:
        full_shape: shape over all ranks.
        sizes: what each rank holds of the split dimension (rows, rows of gate, or columns), for shards of unequal
            size; equal shares when ``None``.
    """
    rows, cols = full_shape[0], full_shape[1] if len(full_shape) > 1 else 1
    if tensor.split == "none":
        return Shard((range(rows),), range(cols))
    extent = {"rows": rows, "gated": rows // 2, "cols": cols}[tensor.split]
    mine = rank_ranges(sizes or [extent // ranks] * ranks)[rank]
    if tensor.split == "cols":
        return Shard((range(rows),), mine)
    if tensor.split == "gated":
        return Shard((mine, range(rows // 2 + mine.start, rows // 2 + mine.stop)), range(cols))
    return Shard((mine,), range(cols))


def shard_sizes(
    tensor: MegatronTensor, layer: int | None, config: ModelConfig, sizes: dict[tuple[str, int], list[int]]
) -> list[int] | None:
    """Rows or columns of every rank from its units, for shards of unequal size; ``None`` for equal shares."""
    units = sizes.get((tensor.axis, layer))
    if units is None:
        return None
    n, d = config.heads_per_group, config.kv_channels
    each = {("kv_head", "rows"): (n + 2) * d, ("kv_head", "cols"): n * d}.get((tensor.axis, tensor.split), 1)
    return [count * each for count in units]


class Block(NamedTuple):
    """A rectangle that a stored tensor and a role tensor share, whole rows of the stored one.

    ``stored_row`` counts rows of the stored tensor; ``row``, ``col`` place it in the role tensor.
    """

    role: str
    stored_row: int
    row: int
    col: int
    rows: int
    cols: int


def blocks(tensor: MegatronTensor, config: ModelConfig, full_rows: int, held: Shard) -> Iterator[Block]:
    """Role blocks of a stored part of ``tensor``; padding rows are left out."""
    stored = 0
    for part in held.rows:
        position = 0
        for role, start, size in tensor.spans(config, full_rows):
            low, high = max(part.start, position), min(part.stop, position + size)
            if low < high and role is not None:
                at = stored + low - part.start
                yield Block(role, at, start + low - position, held.cols.start, high - low, len(held.cols))
            position += size
        stored += len(part)
