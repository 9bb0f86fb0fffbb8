"""What passes over text take: sampling, measuring, gradients, costs of blocks, re-fitting. Bytes, from sizes alone.

Device memory is that of the accelerator a rank computes on; host memory everything beside. Without an accelerator all is host
memory. Streams of all samples, layers that are done and second moments of the whole model lie on the host, of the first process
what is solved for; single layers, a batch, a rank's share of second moments, and one least-squares problem lie on the device.

Compared with real runs in the tests, small ones on a CPU; what a GPU's kernels and allocator add has not been measured.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

from megatron_prune.arch.blocks.block import BLOCKS, BlockKind
from megatron_prune.arch.model import ModelConfig
from megatron_prune.arch.sharding import ParallelLayout
from megatron_prune.arch.tensors import tensor_shape
from megatron_prune.axes.axis import AXES
from megatron_prune.planning.amounts import AFTER, BATCH_TOKENS, PROBED, SAMPLED_ROWS, SAMPLED_TOGETHER, STEP_TOKENS
from megatron_prune.planning.budget import cached_features
from megatron_prune.planning.costs import levels
from megatron_prune.planning.resources import (
    RUNTIME_BYTES,
    Training,
    activation_bytes,
    layer_activations,
    layer_parameters,
    rank_parameters,
    widest_inside,
)

CONTEXT_BYTES = 1 << 30
"""Of a GPU's memory: the driver's context, kernels, workspaces and buffers of NCCL. Assumed, not measured."""


@dataclass(frozen=True, kw_only=True)
class Text:
    """What a model is measured on and re-fitted to.

    Attributes:
        samples: of all sources together.
        seq_length: tokens in one.
        copies: groups of tensor-parallel ranks that share the samples when single layers run: stages × data-parallel.
        width: bytes of a number that is computed with.
    """

    samples: int
    seq_length: int
    copies: int = 1
    width: int = 4

    @property
    def tokens(self) -> int:
        """Of the copy that has most."""
        return -(-self.samples // self.copies) * self.seq_length

    @property
    def batch(self) -> int:
        """Tokens that go through a layer together, at most."""
        return min(self.tokens, max(BATCH_TOKENS, self.seq_length))


class Held(NamedTuple):
    """What a process holds at one time: of its device's memory, and of the host's if it is the first, or another; ``shared`` is
    what lies in both beside an accelerator, and once without."""

    device: int = 0
    first: int = 0
    others: int = 0
    shared: int = 0

    def __add__(self, other: Held) -> Held:
        return Held(*map(sum, zip(self, other)))


@dataclass(frozen=True, kw_only=True)
class Memory:
    """Peaks of a process.

    Attributes:
        device: of its accelerator's memory; 0 for what needs none.
        first, others: of the host's, beside an accelerator: the first process, and every other one.
        alone: of the first process where there is no accelerator.
    """

    device: int
    first: int
    others: int
    alone: int

    @classmethod
    def of(cls, *held: Held) -> Memory:
        """Of a process that has been imported and holds these after one another."""
        device = max(one.device for one in held)
        return cls(
            device=device + CONTEXT_BYTES if device else 0,
            first=RUNTIME_BYTES + max(one.first for one in held),
            others=RUNTIME_BYTES + max(one.others for one in held),
            alone=RUNTIME_BYTES + max(one.device + one.first - one.shared for one in held),
        )

    def together(self, processes: int) -> int:
        """Host memory of all processes, beside accelerators."""
        return self.first + (processes - 1) * self.others


def everywhere(host: int, device: int = 0) -> Held:
    """What every process holds."""
    return Held(device, host, host)


def sampling_memory(config: ModelConfig, layout: ParallelLayout, text: Text) -> Memory:
    """The model samples text: its weights, cached keys and values, logits."""
    batch = min(SAMPLED_TOGETHER, text.samples)
    cached = 2 * cached_features(config) // (layout.tensor * layout.pipeline)
    kept = rank_parameters(config, layout) + batch * cached * text.seq_length
    logits = 3 * 4 * batch * layout.padded_vocab(config.vocab_size)
    return Memory.of(everywhere(0, text.width * kept + logits))


def gradient_memory(config: ModelConfig, layout: ParallelLayout, text: Text) -> Memory:
    """Channels are scored by gradients: the weights, a sample's activations, the embedding's gradient, through which those of the
    units flow."""
    run = Training(seq_length=text.seq_length, mixed_precision=text.width == 2)
    embedding = layout.padded_vocab(config.vocab_size) * config.hidden_size // layout.tensor
    weights = rank_parameters(config, layout) + 2 * embedding
    return Memory.of(everywhere(0, text.width * weights + activation_bytes(config, layout, run)))


def measuring_memory(config: ModelConfig, layout: ParallelLayout, text: Text, moments: list[int], *, rows: bool) -> Memory:
    """Statistics of every layer are collected, and units scored by them.

    Args:
        moments: features of the sites in a layer whose second moments are wanted.
        rows: whether layers are judged by what they leave at sampled tokens, which all processes keep of all layers.
    """
    hidden, inside, ranks = config.hidden_size, widest_inside(config), layout.tensor
    share = sum(8 * width * width for width in moments)
    sampled = min(SAMPLED_ROWS, text.samples * text.seq_length) if rows else 0
    device = _layer_and_batch(config, layout, text) + share // ranks + 4 * sampled * (hidden + inside)
    stream = text.width * text.tokens * hidden
    seen = 4 * config.num_layers * sampled * (hidden + 2 * sampled)
    inverted = 3 * 8 * max((width * width for width in moments), default=0)
    return Memory.of(Held(device, stream + share, stream, share if ranks == 1 else 0), everywhere(seen), everywhere(inverted))


def refit_memory(config: ModelConfig, target: ModelConfig, layout: ParallelLayout, text: Text) -> Memory:
    """Re-fitting (``surgery/refit.py``).

    On the host lie the dense and the pruned stream of all samples, what enters the matrix at hand, a new layer in float64, of
    the first process also the layers of a window that are done and the second moments of both halves of the samples. On the
    device lie a dense layer, the new ones of a window, a batch, and then the second moments, a least-squares problem (of the
    first process), or the copies of a window's weights that the joint fit steps and looks back to.
    """
    hidden, width, ranks = config.hidden_size, target.hidden_size, layout.tensor
    window, new = window_of(config, target), layer_parameters(target)
    streams = text.width * text.tokens * (hidden + width * (2 if window > 1 else 1) + widest_inside(target) // ranks)
    readers = 8 * max(kind_readers(target), default=0) if cuts_stream(config, target) else 0
    base = Held(
        _layer_and_batch(config, layout, text) + text.width * window * new // ranks,
        streams + 8 * new + readers + 4 * (window - 1) * new,
        streams + 8 * new + readers,
    )
    found = [base + part for one in solved_matrices(config, target) for part in _solving(one, ranks)]
    kept = sum(sorted((_rank_activations(target, layer, ranks) for layer in range(target.num_layers)), reverse=True)[:window])
    step = text.width * max(STEP_TOKENS, text.seq_length) * int(kept)
    found.append(base + everywhere(0, 4 * 7 * window * new // ranks + step))
    found.append(base + everywhere(2 * 4 * new))  # the matrices of a layer, and parts of them that ranks send each other
    matrices = 1 if target.tie_embeddings else 2
    ends = Held(0, 4 * config.vocab_size * (hidden + matrices * width), 0)
    head = 4 * target.vocab_size * width
    loss = everywhere(head + head // 2, head + 12 * target.vocab_size * text.seq_length)
    return Memory.of(base + ends, base + loss, *found)


def _solving(problem: tuple[int, int], ranks: int) -> tuple[Held, Held]:
    """Second moments of both halves on the ranks, with the first half's whole; then a problem that is being solved."""
    features, targets = problem
    whole = 8 * features * (features + targets)
    shares = 2 * whole // ranks
    shared = shares if ranks == 1 else 0  # a single rank's share is the whole
    solved, found = 8 * (2 * features**2 + 3 * features * targets), 8 * features * targets
    return Held(shares, 2 * whole, 0, shared), Held(shares + solved, 2 * whole + found, found, shared)


def probing_memory(config: ModelConfig, layout: ParallelLayout, text: Text) -> Memory:
    """Blocks are probed (``surgery/probes.py``): streams of the model with each of a block's writers, a layer and the head, and a
    batch in the layer, or the matrices of a writer that is being solved for."""
    hidden, inside, ranks = config.hidden_size, widest_inside(config), layout.tensor
    writers = max(len(levels(BLOCKS.get(name))) for name in config.blocks)
    tokens = min(PROBED, text.samples) * text.seq_length
    streams = text.width * tokens * (hidden * (writers + 4) + inside // ranks)
    head = 4 * config.vocab_size * hidden
    base = everywhere(streams, text.width * layer_parameters(config) // ranks + head)
    batch = text.width * min(tokens, max(BATCH_TOKENS, text.seq_length)) * (3 * inside // ranks + 4 * hidden)
    kept = inside * 3 // 4
    solved = 8 * (inside**2 + kept * inside + 2 * kept**2 + 4 * inside * hidden)
    return Memory.of(
        base + everywhere(head // 2, 12 * config.vocab_size * text.seq_length),
        base + everywhere(0, batch),
        base + everywhere(8 * inside**2),
        base + everywhere(0, solved),
    )


def window_of(config: ModelConfig, target: ModelConfig) -> int:
    """Layers that are fitted together, at most."""
    return 1 if target.num_layers == config.num_layers else min(1 + AFTER, target.num_layers)


def solved_matrices(config: ModelConfig, target: ModelConfig) -> list[tuple[int, int]]:
    """(features, targets) of the least-squares problems that may come up, each once; where nothing is cut, as if all were."""
    found = set()
    for layer in {target.of_layer(number) for number in range(target.num_layers)}:
        folds = layer.kinds[-1:] if target.num_layers < config.num_layers else ()
        for kind in (*cut_kinds(config, target, layer), *folds):
            found.add((layer.size(kind.inside_space), target.hidden_size))
    if cuts_stream(config, target):
        found.add((target.hidden_size, config.hidden_size))
    return sorted(found)


def cuts_stream(config: ModelConfig, target: ModelConfig) -> bool:
    """Whether what reads the stream is fitted; where nothing is cut, as if it were."""
    return target.hidden_size < config.hidden_size or target == config


def cut_kinds(config: ModelConfig, target: ModelConfig, layer: ModelConfig) -> list[BlockKind]:
    """Blocks of a new layer that were cut; where nothing is, as if all were."""
    largest = lambda axis: max(AXES.get(axis).count(config.of_layer(number)) for number in range(config.num_layers))
    cut = lambda kind: any(AXES.get(axis).count(layer) < largest(axis) for axis in kind.axes)
    return [kind for kind in layer.kinds if cuts_stream(config, target) or cut(kind)]


def kind_readers(target: ModelConfig) -> list[int]:
    """Parameters in the readers of the blocks of the first layer."""
    layer = target.of_layer(0)
    count = lambda role: tensor_shape(role, layer)[0] * target.hidden_size
    return [sum(map(count, kind.readers)) for kind in layer.kinds]


def _layer_and_batch(config: ModelConfig, layout: ParallelLayout, text: Text) -> int:
    """A layer of a rank, and what a batch takes in it: what is inside whole on every rank, and in float32, where moments want it."""
    hidden, inside, ranks = config.hidden_size, widest_inside(config), layout.tensor
    features = 3 * inside // ranks + 4 * hidden
    return text.width * (layer_parameters(config) // ranks + text.batch * features) + 4 * text.batch * (inside + hidden)


def _rank_activations(config: ModelConfig, layer: int, ranks: int) -> float:
    return layer_activations(config.of_layer(layer), config.hidden_size, ranks)
