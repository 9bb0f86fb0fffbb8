"""What a block is: a part of a layer that reads the stream through a norm and adds something to it.

    stream ─▶ norm ─▶ readers ─▶ (inside) ─▶ writer ─▶ after_norm, where there is one ─▶ added to the stream

Everything that measuring, cutting, fitting and sharding ask of attention or of a feed-forward block is said in its kind, as
data: nothing outside of this package and ``families/`` names a role.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Iterator, Literal, NamedTuple, Protocol

from megatron_prune.registry import Registry

BLOCKS: Registry[BlockKind] = Registry("block kind", "megatron_prune.arch.blocks")


class Role(NamedTuple):
    """A role tensor of a block, full and unfused, laid out as in Hugging Face (``[out, in]``).

    ``spaces`` are those of its dimensions, outermost first; ``trait`` is the field of :class:`ModelConfig` that says whether
    a model has it (``""``: always).
    """

    name: str
    spaces: tuple[str, ...]
    trait: str = ""


OUTER = (Role("embedding", ("vocab", "hidden")), Role("final_norm", ("hidden",)), Role("output", ("vocab", "hidden")))
"""The role tensors outside the layers."""


def spaces(role: str) -> tuple[str, ...]:
    """The spaces of a role tensor's dimensions, outermost first."""
    return _spaces()[role]


def reads(role: str, dim: int) -> bool:
    """Whether a role tensor reads from the space of a dimension; else it writes into it, as the embedding does with both."""
    return dim == 1 and role != OUTER[0].name


@functools.cache
def _spaces() -> dict[str, tuple[str, ...]]:
    """Of every role that a model can have."""
    return {role.name: role.spaces for role in (*OUTER, *(role for name in BLOCKS.names() for role in BLOCKS.get(name).roles))}


@functools.cache
def kind_of(role: str) -> BlockKind | None:
    """The kind of block that a role is in; ``None`` outside the layers."""
    kinds = map(BLOCKS.get, BLOCKS.names())
    return next((kind for kind in kinds if any(known.name == role for known in kind.roles)), None)


def is_writer(role: str) -> bool:
    """Whether a role writes to the stream from inside a block."""
    kind = kind_of(role)
    return kind is not None and kind.writer == role


class Sized(Protocol):
    """What says how large a space is: a model, or one layer of it."""

    def size(self, space: str) -> int:
        """Elements."""

    def units(self, axis: str) -> int:
        """Units."""


class Padded(Protocol):
    """What says to how many rows a vocabulary is padded."""

    def padded_vocab(self, vocab_size: int) -> int: ...


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
        axis: the axis along which ranks share it (``""`` when replicated).
        by_group: the roles' rows stand KV group by KV group; else one role follows on the other.
    """

    name: str
    local_name: str
    roles: tuple[str, ...]
    split: Literal["rows", "gated", "cols", "none"]
    axis: str = ""
    by_group: bool = False

    @property
    def module(self) -> str:
        """The module of megatron-core's local layers that holds it."""
        return self.local_name.rpartition(".")[0]

    def full_shape(self, config: Sized, layout: Padded) -> tuple[int, ...]:
        """Shape over all ranks, vocabulary padding included.

        Args:
            config: of the layer (:meth:`ModelConfig.of_layer`), or of a model whose layers are alike.
        """
        rows = sum(config.size(spaces(role)[0]) for role in self.roles)
        others = (config.size(space) for space in spaces(self.roles[0])[1:])
        return (layout.padded_vocab(rows) if self.axis == "vocab" else rows, *others)

    def spans(self, config: Sized, rows: int) -> Iterator[Span]:
        """Role rows of the full tensor's ``rows`` rows, in order."""
        if self.by_group:
            yield from self._spans_by_group(config)
            return
        used = 0
        for role in self.roles:
            size = config.size(spaces(role)[0])
            yield Span(role, 0, size)
            used += size
        if rows > used:
            yield Span(None, 0, rows - used)

    def _spans_by_group(self, config: Sized) -> Iterator[Span]:
        groups = config.units("kv_head")
        for group in range(groups):
            for role in self.roles:
                each = config.size(spaces(role)[0]) // groups
                yield Span(role, group * each, each)


@dataclass(frozen=True, kw_only=True)
class BlockKind:
    """Attributes:
    half: which half of a layer it is: ``"attention"`` (what comes first) or ``"mlp"``; what files and options call it.
    roles: in the order in which a model lists them.
    norm: role of the norm before it; its output is the input of the readers.
    readers: roles of the matrices that read the norm's output.
    inside: name of what stands between readers and writer, in statistics.
    inside_space: its space.
    writer: role of the matrix that reads it and writes to the stream.
    after_norm: role of a norm between the writer and the stream, in models that have one.
    axes: along which it can be cut, the finest unit of ``inside_space`` first.
    mixes_tokens: a token's result depends on the tokens before it.
    megatron: the tensors in which Megatron stores the roles, in order of use.
    """

    name: str
    half: Literal["attention", "mlp"]
    roles: tuple[Role, ...]
    norm: str
    readers: tuple[str, ...]
    inside: str
    inside_space: str
    writer: str
    after_norm: str
    axes: tuple[str, ...]
    mixes_tokens: bool
    megatron: tuple[MegatronTensor, ...]

    @property
    def matrices(self) -> tuple[str, ...]:
        """Roles of the matrices: the readers, and the writer."""
        return (*self.readers, self.writer)

    @property
    def inputs(self) -> dict[str, str]:
        """Role of a matrix → name of what it reads: the output of the norm, or what is inside."""
        return {**dict.fromkeys(self.readers, self.norm), self.writer: self.inside}

    def tensor_of(self, role: str) -> MegatronTensor:
        """The Megatron tensor that holds a role."""
        return next(tensor for tensor in self.megatron if role in tensor.roles)


def replicated(name: str, local_name: str, role: str) -> MegatronTensor:
    """A tensor that every rank holds."""
    return MegatronTensor(name=name, local_name=local_name, roles=(role,), split="none")
