"""Memory and disk of each step from sizes alone.

Counts are bytes. Training follows Megatron-LM's mixed precision with the distributed optimizer (Shoeybi et al. 2019,
arXiv 1909.08053; Rajbhandari et al. 2020, arXiv 1910.02054), activations Korthikanti et al. 2022 (arXiv 2205.05198) with
flash attention, rewritten for gated feed-forward and grouped-query attention.

All of it, and the time of a recovery, is compared with real runs in the tests, small ones on a CPU; what a GPU's kernels and
allocator add has not been measured.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import prod

from megatron_prune.arch.blocks.block import BLOCKS, BlockKind, spaces
from megatron_prune.arch.model import ModelConfig
from megatron_prune.arch.sharding import ParallelLayout, layer_tensors
from megatron_prune.arch.tensors import full_shape, layer_roles, parameter_count, tensor_ids, tensor_shape
from megatron_prune.checkpoint.options import WORKERS
from megatron_prune.planning.budget import cached_features
from megatron_prune.planning.costs import levels

BUCKET = 40_000_000
"""Parameters in a bucket of megatron-core's gradient buffer (``DistributedDataParallelConfig``)."""
PROCESS_BYTES = 330 << 20
"""Interpreter and imports of a process that streams (measured: torch 2.13 on Linux, CPU build)."""
RUNTIME_BYTES = 400 << 20
"""Interpreter, imports and process groups of a process that runs a model with megatron-core (measured: 358 MiB, and 382
MiB with optimizer and tokenizer imported, torch 2.13 on Linux, CPU build)."""


@dataclass(frozen=True, kw_only=True)
class Training:
    """How a recovery would run."""

    data_parallel: int = 1
    micro_batch_size: int = 1
    seq_length: int = 4096
    mixed_precision: bool = True
    sequence_parallel: bool = True
    recompute: bool = False
    teacher: ModelConfig | None = None


@dataclass(frozen=True, kw_only=True)
class Text:
    """What a model is measured on and re-fitted to, in float32.

    Attributes:
        samples: of all sources together.
        seq_length: tokens in one.
        copies: groups of tensor-parallel ranks that share the samples when single layers run: stages × data-parallel.
        sampled: own samples that are made in one batch.
        batch_tokens: tokens that go through a layer together.
    """

    samples: int
    seq_length: int
    copies: int
    sampled: int
    batch_tokens: int

    @property
    def tokens(self) -> int:
        """Of the copy that has most."""
        return -(-self.samples // self.copies) * self.seq_length


def weight_bytes(config: ModelConfig, itemsize: int) -> int:
    """The model's weights, vocabulary padding not counted."""
    return parameter_count(config) * itemsize


def streaming_memory(config: ModelConfig, itemsize: int, *, buffers: int = 1) -> int:
    """Peak of one process that converts or exports (``buffers`` 1) or prunes (2: the cut has one of its own).

    Every thread holds a tensor, and a part of one where a format splits it by columns or changes its dtype.
    """
    largest = sorted((prod(full_shape(tensor, config)) for tensor in tensor_ids(config)), reverse=True)
    matrix = widest_inside(config) * config.hidden_size
    return PROCESS_BYTES + itemsize * (buffers * sum(largest[:WORKERS]) + WORKERS * matrix)


def rank_parameters(config: ModelConfig, layout: ParallelLayout) -> int:
    """Parameters of the fullest rank: its stage's layers, and the embedding or the output layer with padding."""
    each = [_rank_layer(config.of_layer(layer), layout) for layer in range(config.num_layers)]
    stages = (layout.stage_layers(stage, config.num_layers) for stage in range(layout.pipeline))
    fullest = max(sum(each[layer] for layer in layers) for layers in stages)
    vocabulary = layout.padded_vocab(config.vocab_size) * config.hidden_size // layout.tensor
    matrices = 2 if layout.pipeline == 1 and not config.tie_embeddings else 1
    return fullest + matrices * vocabulary + config.hidden_size


def _rank_layer(config: ModelConfig, layout: ParallelLayout) -> int:
    """Parameters of a layer on one rank."""
    sizes = ((tensor.split, prod(tensor.full_shape(config, layout))) for tensor in layer_tensors(config))
    return sum(whole if split == "none" else whole // layout.tensor for split, whole in sizes)


def widest_inside(config: ModelConfig) -> int:
    """Features inside the widest block of any layer."""
    layers = map(config.of_layer, range(config.num_layers))
    return max(layer.size(kind.inside_space) for layer in layers for kind in layer.kinds)


def training_memory(config: ModelConfig, layout: ParallelLayout, run: Training) -> dict[str, int]:
    """Peak of the fullest rank in training steps, by what it is used for; on a GPU, of its memory."""
    parameters = rank_parameters(config, layout)
    weights = 2 if run.mixed_precision else 4
    state = 12 if run.mixed_precision else 8  # Adam's two moments; with mixed precision also the float32 weights
    parts = {
        "weights": parameters * weights,
        "gradients": parameters * 4,
        "optimizer": parameters * state // run.data_parallel,
        "teacher": rank_parameters(run.teacher, layout) * weights if run.teacher else 0,
        "activations": activation_bytes(config, layout, run),
        "process": RUNTIME_BYTES,
    }
    return {name: amount for name, amount in parts.items() if amount}


def saving_memory(config: ModelConfig, layout: ParallelLayout, run: Training, *, bucket: int | None = BUCKET) -> int:
    """Host memory of a rank beside the training's when a checkpoint is saved (on a CPU: instead of the activations).

    megatron-core gathers the float32 weights and moments of the rank's shard over the data-parallel copies, a bucket of
    its gradient buffer at a time.

    Args:
        bucket: parameters in one; ``None`` for all in one, as without overlapped reduction, which is so on a CPU.
    """
    parameters = rank_parameters(config, layout)
    together = parameters if bucket is None else min(bucket, parameters)
    return 12 * parameters + 12 * together // run.data_parallel + 8 * together


def training_seconds(config: ModelConfig, run: Training, *, tokens: float, devices: int, flops: float) -> float:
    """Time of a recovery.

    Args:
        devices: of all data-parallel copies together.
        flops: floating-point operations per second that a device does of those that :func:`training_flops` counts.
    """
    own, forward = training_flops(config, run.seq_length), 1.0 / 3.0
    each = own * (1.0 + forward * run.recompute)
    each += forward * training_flops(run.teacher, run.seq_length) if run.teacher else 0.0
    return tokens * each / (devices * flops)


def activation_bytes(config: ModelConfig, layout: ParallelLayout, run: Training) -> int:
    """Activations kept for the backward pass on the fullest stage: the first has as many micro-batches in flight as there are
    stages, each after it one less; the last has the logits."""
    tokens, ranks = run.seq_length * run.micro_batch_size, layout.tensor
    width = 2 if run.mixed_precision else 4
    stream = config.hidden_size / (ranks if run.sequence_parallel else 1)
    kept = lambda kind, layer: 2 * stream + sum(map(layer.size, _inside(kind))) / ranks  # the norm's and the linears' inputs
    layers = map(config.of_layer, range(config.num_layers))
    each = [stream if run.recompute else sum(kept(kind, layer) for kind in layer.kinds) for layer in layers]
    count = config.num_layers // layout.pipeline
    stages = [sum(each[stage * count : (stage + 1) * count]) * (layout.pipeline - stage) for stage in range(layout.pipeline)]
    found = [int(tokens * width * stage) for stage in stages]
    found[-1] += 2 * 4 * tokens * layout.padded_vocab(config.vocab_size) // ranks
    return max(found)


def _inside(kind: BlockKind) -> list[str]:
    """Spaces of what the readers give and the writer takes."""
    return [*(spaces(role)[0] for role in kind.readers), kind.inside_space]


def sampling_memory(config: ModelConfig, layout: ParallelLayout, text: Text) -> int:
    """Peak of the fullest rank while the model samples text: its weights, cached keys and values, logits."""
    batch = min(text.sampled, text.samples)
    cached = 2 * cached_features(config) // (layout.tensor * layout.pipeline)
    logits = 3 * layout.padded_vocab(config.vocab_size)
    return RUNTIME_BYTES + 4 * (rank_parameters(config, layout) + batch * (cached * text.seq_length + logits))


def gradient_memory(config: ModelConfig, layout: ParallelLayout, text: Text) -> int:
    """Peak of the fullest rank while channels are scored by gradients: its weights, a sample's activations, the embedding's
    gradient, through which those of the units flow."""
    run = Training(seq_length=text.seq_length, mixed_precision=False, sequence_parallel=False)
    embedding = layout.padded_vocab(config.vocab_size) * config.hidden_size // layout.tensor
    weights = rank_parameters(config, layout) + 2 * embedding
    return RUNTIME_BYTES + 4 * weights + activation_bytes(config, layout, run)


def refit_memory(config: ModelConfig, target: ModelConfig, layout: ParallelLayout, text: Text, window: int) -> int:
    """Peak of the first process in re-fitting (``surgery/refit.py``); the others do without the solver's matrices.

    The dense and the pruned stream of all its samples, what enters the matrix at hand, a dense layer and the new ones of a
    window, and then either the second moments of both halves of the samples with what solving adds, or the copies of the
    window's weights that the joint fit steps and looks back to; or, at the end, embedding and head, and a sample's logits.

    Args:
        window: layers that are fitted together.
    """
    hidden, new_hidden, ranks = config.hidden_size, target.hidden_size, layout.tensor
    features = max(widest_inside(target), new_hidden)
    dense, new = layer_parameters(config), layer_parameters(target)
    streams = 4 * text.tokens * (hidden + new_hidden * (2 if window > 1 else 1) + features // ranks)
    layers = (4 * dense + 4 * window * new) // ranks + 4 * (window + 1) * new
    batch = 4 * min(text.tokens, text.batch_tokens) * (3 * max(config.each("ffn_hidden_size")) // ranks + features + 4 * hidden)
    solving = 8 * (7 * features**2 + 10 * features * max(hidden, new_hidden))
    joint = 4 * 7 * window * new // ranks
    matrices = 1 if target.tie_embeddings else 2
    vocabulary = 4 * config.vocab_size * (hidden + matrices * new_hidden + 3 * text.seq_length)
    return RUNTIME_BYTES + streams + layers + max(batch + max(solving, joint), vocabulary)


def probing_memory(config: ModelConfig, layout: ParallelLayout, text: Text, samples: int) -> int:
    """Peak of a process that probes blocks (``surgery/probes.py``): streams of the model with each of a block's writers, a layer and
    the head, and a batch in the layer, or the matrices of a writer that is being solved for.

    Args:
        samples: that are probed with.
    """
    hidden, inside, ranks = config.hidden_size, widest_inside(config), layout.tensor
    writers = max(len(levels(BLOCKS.get(name))) for name in config.blocks)
    tokens = min(samples, text.samples) * text.seq_length
    streams = 4 * tokens * (hidden * (writers + 4) + inside // ranks)
    batch = 4 * min(tokens, text.batch_tokens) * (3 * inside // ranks + 4 * hidden)
    solving = 8 * (5 * inside**2 + 4 * inside * hidden)
    head = 4 * config.vocab_size * (hidden + 3 * text.seq_length)
    return RUNTIME_BYTES + streams + 4 * layer_parameters(config) // ranks + head + max(batch, solving)


def layer_parameters(config: ModelConfig) -> int:
    """Of the largest layer, over all ranks."""
    layers = map(config.of_layer, range(config.num_layers))
    return max(sum(prod(tensor_shape(role, layer)) for role in layer_roles(layer)) for layer in layers)


def training_flops(config: ModelConfig, seq_length: int) -> float:
    """Floating-point operations of training on one token: forward, and twice as many backward.

    Matrix products alone, a multiply-add counted as two, attention over the half of the keys that a causal mask leaves
    (Narayanan et al. 2021, arXiv 2104.04473, appendix, for gated feed-forward and grouped-query attention).
    """
    total = config.vocab_size * config.hidden_size
    for layer in map(config.of_layer, range(config.num_layers)):
        for kind in layer.kinds:
            total += sum(prod(tensor_shape(role, layer)) for role in kind.matrices)
            total += seq_length * layer.size(kind.inside_space) if kind.mixes_tokens else 0
    return 3.0 * 2.0 * total


def training_disk(config: ModelConfig, run: Training) -> int:
    """One recovery checkpoint: weights and optimizer state."""
    return parameter_count(config) * (2 + 12 if run.mixed_precision else 4 + 8)
