"""Which part of Megatron's tensors (``blocks/block.py``) a tensor-parallel rank holds.

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
from typing import Iterator, NamedTuple

from megatron_prune.arch.blocks.block import MegatronTensor, spaces
from megatron_prune.arch.model import ModelConfig
from megatron_prune.arch.tensors import EMBEDDING, FINAL_NORM, HEAD, TensorId, layer_roles
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
        if not problems:  # asked of thousands of shapes
            return
        legal = legal_tensor_sizes(config)
        raise_all(
            InputError,
            f"{what} does not divide over TP {self.tensor} × PP {self.pipeline}",
            problems,
            do=f"use a tensor-parallel size out of {legal} and a pipeline size that divides {config.num_layers}",
        )


def legal_tensor_sizes(config: ModelConfig) -> list[int]:
    """Tensor-parallel sizes that divide the model."""
    most = max((heads for heads in config.each("num_attention_heads") if heads), default=max(config.each("ffn_hidden_size")))
    return [size for size in range(1, most + 1) if not _tensor_problems(config, size)]


def _tensor_problems(config: ModelConfig, tensor: int) -> list[str]:
    """What does not divide over ``tensor`` ranks; sizes that several layers share are named once."""
    found: dict[str, list[int]] = {}
    for layer in range(config.num_layers if config.differing else 1):
        for problem in _layer_problems(config.of_layer(layer), tensor):
            found.setdefault(problem, []).append(layer)
    where = lambda layers: (" in layer " if len(layers) == 1 else " in layers ") + ", ".join(map(str, layers))
    return [problem + ("" if config.is_uniform else where(layers)) for problem, layers in found.items()]


def _layer_problems(config: ModelConfig, tensor: int) -> list[str]:
    problems, heads, groups, channels = [], config.units("head"), config.units("kv_head"), config.units("ffn")
    rows = config.size("head") + 2 * config.size("kv_head")
    if heads % tensor:
        problems.append(f"{heads} attention heads do not divide over {tensor} ranks")
    if groups and groups % tensor and tensor % groups:
        problems.append(f"{groups} KV groups neither divide over {tensor} ranks nor divide their number")
    if rows % tensor:
        problems.append(f"{rows} fused QKV rows do not divide over {tensor} ranks")
    if channels % tensor:
        problems.append(f"{channels} FFN channels do not divide over {tensor} ranks")
    return problems


def _outer(name: str, tensor: TensorId, split: str) -> MegatronTensor:
    axis = "" if split == "none" else "vocab"
    return MegatronTensor(name=name, local_name=name, roles=(tensor.role,), split=split, axis=axis)


WORD_EMBEDDINGS = _outer("embedding.word_embeddings.weight", EMBEDDING, "rows")
FINAL_LAYERNORM = _outer("decoder.final_layernorm.weight", FINAL_NORM, "none")
OUTPUT_LAYER = _outer("output_layer.weight", HEAD, "rows")


def layer_tensors(config: ModelConfig) -> list[MegatronTensor]:
    """The Megatron tensors of a layer; ``config`` is that of the layer, or of a model whose layers are alike."""
    present = set(layer_roles(config))
    return [tensor for kind in config.kinds for tensor in kind.megatron if tensor.roles[0] in present]


def outer_tensors(config: ModelConfig) -> list[MegatronTensor]:
    """The Megatron tensors outside the layers."""
    return [WORD_EMBEDDINGS, FINAL_LAYERNORM] + ([] if config.tie_embeddings else [OUTPUT_LAYER])


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
    config = config.of_layer(layer)
    shared = [spaces(tensor.roles[0])[1]] if tensor.split == "cols" else [spaces(role)[0] for role in tensor.roles]
    elements = sum(map(config.size, shared)) // (2 if tensor.split == "gated" else 1)
    return [count * (elements // config.units(tensor.axis)) for count in units]


class Patch(NamedTuple):
    """A rectangle that a stored tensor and a role tensor share, whole rows of the stored one.

    ``stored_row`` counts rows of the stored tensor; ``row``, ``col`` place it in the role tensor.
    """

    role: str
    stored_row: int
    row: int
    col: int
    rows: int
    cols: int


def patches(tensor: MegatronTensor, config: ModelConfig, full_rows: int, held: Shard) -> Iterator[Patch]:
    """The rectangles of role tensors in a stored part of ``tensor``; padding rows are left out.

    Args:
        config: as for :func:`layer_tensors`.
    """
    stored = 0
    for part in held.rows:
        position = 0
        for role, start, size in tensor.spans(config, full_rows):
            low, high = max(part.start, position), min(part.stop, position + size)
            if low < high and role is not None:
                at = stored + low - part.start
                yield Patch(role, at, start + low - position, held.cols.start, high - low, len(held.cols))
            position += size
        stored += len(part)
