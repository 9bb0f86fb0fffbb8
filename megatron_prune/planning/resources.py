"""Memory, disk and operations of recovery, and memory of what streams a model, from sizes alone.

What passes over text take stands in ``passes.py`` and ``work.py``. Counts are bytes. Training follows Megatron-LM's mixed
precision with the distributed optimizer (Shoeybi et al. 2019, arXiv 1909.08053; Rajbhandari et al. 2020, arXiv 1910.02054),
activations Korthikanti et al. 2022 (arXiv 2205.05198) with flash attention, rewritten for gated feed-forward and grouped-query
attention.

All of it, and the time of a recovery, is compared with real runs in the tests, small ones on a CPU; what a GPU's kernels and
allocator add has not been measured.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import prod

from megatron_prune.arch.blocks.block import BlockKind, spaces
from megatron_prune.arch.model import ModelConfig
from megatron_prune.arch.sharding import ParallelLayout, layer_tensors
from megatron_prune.arch.tensors import full_shape, layer_roles, parameter_count, tensor_ids, tensor_shape
from megatron_prune.checkpoint.options import WORKERS

BUCKET = 40_000_000
"""Parameters in a bucket of megatron-core's gradient buffer (``DistributedDataParallelConfig``)."""
PROCESS_BYTES = 330 << 20
"""Interpreter and imports of a process that streams (measured: torch 2.13 on Linux, CPU build)."""
RUNTIME_BYTES = 400 << 20
"""Interpreter, imports and process groups of a process that runs a model with megatron-core (measured: 358 MiB, and 382
MiB with optimizer and tokenizer imported, torch 2.13 on Linux, CPU build)."""


@dataclass(frozen=True, kw_only=True)
class Training:
    """How a recovery would run; the names are those of ``recover``'s flags."""

    data_parallel: int = 1
    micro_batch_size: int = 1
    seq_length: int = 4096
    mixed_precision: bool = True
    sequence_parallel: bool = False
    recompute_granularity: str | None = None
    recompute_method: str | None = None
    recompute_num_layers: int | None = None
    lora_r: int | None = None
    teacher: ModelConfig | None = None


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


def trained_parameters(config: ModelConfig, layout: ParallelLayout, run: Training) -> int:
    """Parameters of the fullest rank that a recovery trains: all, or an adapter for every matrix, of which the side that ranks do
    not share is whole on each."""
    if run.lora_r is None:
        return rank_parameters(config, layout)
    each = [_rank_adapters(config.of_layer(layer), layout) for layer in range(config.num_layers)]
    stages = (layout.stage_layers(stage, config.num_layers) for stage in range(layout.pipeline))
    return run.lora_r * max(sum(each[layer] for layer in layers) for layers in stages)


def _rank_adapters(layer: ModelConfig, layout: ParallelLayout) -> int:
    """Rows and columns of a layer's matrices on one rank."""
    total = 0
    for kind in layer.kinds:
        for role in kind.matrices:
            rows, cols = tensor_shape(role, layer)
            total += rows + cols // layout.tensor if role == kind.writer else rows // layout.tensor + cols
    return total


def widest_inside(config: ModelConfig) -> int:
    """Features inside the widest block of any layer."""
    layers = map(config.of_layer, range(config.num_layers))
    return max(layer.size(kind.inside_space) for layer in layers for kind in layer.kinds)


def training_memory(config: ModelConfig, layout: ParallelLayout, run: Training) -> dict[str, int]:
    """Peak of the fullest rank in training steps, by what it is used for; on a GPU, of its memory."""
    parameters, trained = rank_parameters(config, layout), trained_parameters(config, layout, run)
    weights = 2 if run.mixed_precision else 4
    state = 12 if run.mixed_precision else 8  # Adam's two moments; with mixed precision also the float32 weights
    parts = {
        "weights": parameters * weights,
        "adapters": trained * weights if run.lora_r else 0,
        "gradients": trained * 4,
        "optimizer": trained * state // run.data_parallel,
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
    parameters = trained_parameters(config, layout, run)
    together = parameters if bucket is None else min(bucket, parameters)
    return 12 * parameters + 12 * together // run.data_parallel + 8 * together


def training_seconds(config: ModelConfig, run: Training, *, tokens: float, devices: int, flops: float) -> float:
    """Time of a recovery.

    Args:
        devices: of all data-parallel copies together.
        flops: floating-point operations per second that a device does of those that :func:`training_flops` counts.
    """
    passes = 2.0 / 3.0 if run.lora_r else 1.0  # no gradients of weights that stay
    each = passes * training_flops(config, run.seq_length) + _recomputed_flops(config, run)
    each += training_flops(run.teacher, run.seq_length) / 3.0 if run.teacher else 0.0
    return tokens * each / (devices * flops)


def _recomputed_flops(config: ModelConfig, run: Training) -> float:
    """Operations on one token that are done again for the backward pass; of ``block`` as of all layers."""
    if run.recompute_granularity is None:
        return 0.0
    layers = [config.of_layer(layer) for layer in range(config.num_layers)]
    if run.recompute_granularity == "full":
        return sum(layer_flops(layer, run.seq_length) for layer in layers)
    return sum(attention_flops(kind, layer, run.seq_length) for layer in layers for kind in layer.kinds)


def activation_bytes(config: ModelConfig, layout: ParallelLayout, run: Training) -> int:
    """Activations kept for the backward pass on the fullest stage: the first has as many micro-batches in flight as there are
    stages, each after it one less; the last has the logits.

    With full recomputation a unit of layers keeps what enters it, and one unit at a time is there whole. Flash attention keeps
    no scores, so that selective recomputation, which is of attention alone, keeps no less.
    """
    tokens, ranks = run.seq_length * run.micro_batch_size, layout.tensor
    width = 2 if run.mixed_precision else 4
    stream = config.hidden_size / (ranks if run.sequence_parallel else 1)
    layers = map(config.of_layer, range(config.num_layers))
    each = [layer_activations(layer, stream, ranks) for layer in layers]
    count = config.num_layers // layout.pipeline
    found = []
    for stage in range(layout.pipeline):
        kept, whole = _kept_activations(each[stage * count : (stage + 1) * count], stream, run)
        found.append(int(tokens * width * (kept * (layout.pipeline - stage) + whole)))
    found[-1] += 2 * 4 * tokens * layout.padded_vocab(config.vocab_size) // ranks
    return max(found)


def layer_activations(layer: ModelConfig, stream: float, ranks: int) -> float:
    """Features of a token that a layer keeps for its backward pass: the norms' inputs, the linears' and attention's.

    Args:
        stream: features of the stream that a rank keeps.
    """
    return sum(2 * stream + sum(map(layer.size, _inside(kind))) / ranks for kind in layer.kinds)


def _kept_activations(each: list[float], stream: float, run: Training) -> tuple[float, float]:
    """Features of a token that a stage keeps of a micro-batch in flight, and of the one whose backward pass runs besides."""
    if run.recompute_granularity != "full":
        return sum(each), 0.0
    unit = run.recompute_num_layers or 1
    if run.recompute_method == "block":
        return stream * unit + sum(each[unit:]), max(each[:unit])
    units = [sum(each[start : start + unit]) for start in range(0, len(each), unit)]
    return stream * len(units), max(units)


def _inside(kind: BlockKind) -> list[str]:
    """Spaces of what the readers give and the writer takes."""
    return [*(spaces(role)[0] for role in kind.readers), kind.inside_space]


def layer_parameters(config: ModelConfig) -> int:
    """Of the largest layer, over all ranks."""
    layers = map(config.of_layer, range(config.num_layers))
    return max(sum(prod(tensor_shape(role, layer)) for role in layer_roles(layer)) for layer in layers)


def training_flops(config: ModelConfig, seq_length: int) -> float:
    """Floating-point operations of training on one token: forward, and twice as many backward.

    Matrix products alone, a multiply-add counted as two, attention over the half of the keys that a causal mask leaves
    (Narayanan et al. 2021, arXiv 2104.04473, appendix, for gated feed-forward and grouped-query attention).
    """
    return 3.0 * forward_flops(config, seq_length)


def forward_flops(config: ModelConfig, seq_length: int) -> float:
    """Those of a forward pass of one token, the logits included."""
    layers = map(config.of_layer, range(config.num_layers))
    return head_flops(config) + sum(layer_flops(layer, seq_length) for layer in layers)


def head_flops(config: ModelConfig) -> float:
    """Those of one token's logits."""
    return 2.0 * config.vocab_size * config.hidden_size


def layer_flops(layer: ModelConfig, seq_length: int) -> float:
    """Those of a forward pass of one token through a layer."""
    return sum(block_flops(kind, layer, seq_length) for kind in layer.kinds)


def block_flops(kind: BlockKind, layer: ModelConfig, seq_length: int) -> float:
    """Those of one token in a layer's block."""
    return 2.0 * sum(prod(tensor_shape(role, layer)) for role in kind.matrices) + attention_flops(kind, layer, seq_length)


def attention_flops(kind: BlockKind, layer: ModelConfig, seq_length: int) -> float:
    """Those of one token with the keys and values of others."""
    return 2.0 * seq_length * layer.size(kind.inside_space) if kind.mixes_tokens else 0.0


def training_disk(config: ModelConfig, run: Training) -> int:
    """One recovery checkpoint: weights and optimizer state, or adapters and theirs."""
    each = 2 + 12 if run.mixed_precision else 4 + 8
    trained = parameter_count(config) if run.lora_r is None else trained_parameters(config, ParallelLayout(), run)
    return trained * each
