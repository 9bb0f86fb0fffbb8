"""A checkpoint as a running megatron-core model, sharded over this run's TP × PP."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any, Callable

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.models.gpt import GPTModel
from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed

from megatron_prune.arch.model import ModelConfig
from megatron_prune.arch.sharding import (
    OUTPUT_LAYER,
    WORD_EMBEDDINGS,
    MegatronTensor,
    ParallelLayout,
    Shard,
    layer_tensors,
    outer_tensors,
    patches,
    shard,
)
from megatron_prune.arch.tensors import TensorId
from megatron_prune.checkpoint.tensor_map import TensorMap
from megatron_prune.errors import InputError
from megatron_prune.files.region import close_files
from megatron_prune.runtime import cpu
from megatron_prune.runtime.core_config import transformer_config
from megatron_prune.runtime.ends import embedding_scale
from megatron_prune.runtime.layers import decoder_spec
from megatron_prune.runtime.rotary import inverse_frequencies
from megatron_prune.runtime.world import World


@dataclass
class RunningModel:
    """This process's part of the model.

    Attributes:
        module: megatron-core's GPTModel of this rank's stage, in eval mode.
        device: where it computes.
    """

    module: GPTModel
    config: ModelConfig
    layout: ParallelLayout
    device: torch.device


def start_parallel(layout: ParallelLayout, world: World) -> None:
    """Set up megatron-core's process groups for ``layout`` (once per run)."""
    world.connect(always=True)
    if not parallel_state.model_parallel_is_initialized():
        parallel_state.initialize_model_parallel(layout.tensor, layout.pipeline)
    with cpu.stand_in():
        model_parallel_cuda_manual_seed(1234)


def stop_parallel() -> None:
    """Take megatron-core's process groups down, with their threads and connections.

    megatron-core only forgets its groups; without this every set-up would leave threads behind.
    """
    if parallel_state.model_parallel_is_initialized():
        groups = parallel_state._global_process_group_list or []
        parallel_state.destroy_model_parallel()
        for group in groups:
            if group in dist.distributed_c10d._world.pg_map:  # not those of other ranks, or gone already
                dist.destroy_process_group(group)


def build_model(
    tensors: TensorMap,
    layout: ParallelLayout,
    world: World,
    *,
    dtype: torch.dtype,
    seq_length: int,
    local_layers: bool = False,
    **further: Any,
) -> RunningModel:
    """Build this rank's part of the model and fill it from a checkpoint in any format and layout.

    Args:
        layout: of this run; it must divide the model (``layout.check``) and fit the number of processes.
        dtype: what to compute in.
        seq_length: the longest sequence that will be run, in tokens.
        local_layers: take no layers that fuse a norm with the matrix after it, whatever is installed.
        further: fields of megatron-core's ``TransformerConfig``, such as ``sequence_parallel``.

    Raises:
        CheckpointError: on every rank, if a part of the checkpoint is not what was written.
    """
    config = tensors.config
    start_parallel(layout, world)
    device = torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")
    stage = parallel_state.get_pipeline_model_parallel_rank()
    with cpu.stand_in():
        core = transformer_config(config, layout, dtype, **further)
        module = GPTModel(
            core,
            decoder_spec(core, layout.stage_layers(stage, config.num_layers), local=local_layers),
            vocab_size=layout.padded_vocab(config.vocab_size),
            max_sequence_length=seq_length,
            pre_process=parallel_state.is_pipeline_first_stage(),
            post_process=parallel_state.is_pipeline_last_stage(),
            share_embeddings_and_output_weights=config.tie_embeddings,
            position_embedding_type="rope",
        )
        module.to(device).eval()
        module.rotary_pos_emb.inv_freq = inverse_frequencies(config.of_layer(0)).to(device)  # layers that differ have their own
        if config.scaled_embedding and module.pre_process:
            scale = embedding_scale(config, dtype)
            module.embedding.register_forward_hook(lambda _, inputs, output: output * scale)
    error = None
    try:
        _load(module, tensors, layout)
    except InputError as found:  # on the ranks that read the damaged part
        error = found
    world.agree(error)
    return RunningModel(module, config, layout, device)


def _load(module: GPTModel, tensors: TensorMap, layout: ParallelLayout) -> None:
    """Copy this rank's shards into the module's parameters, one tensor at a time."""
    config = tensors.config
    rank = parallel_state.get_tensor_model_parallel_rank()
    stage = parallel_state.get_pipeline_model_parallel_rank()
    parameters = dict(module.named_parameters())
    wanted: list[tuple[str, int | None, MegatronTensor]] = [(t.name, None, t) for t in outer_tensors(config)]
    if config.tie_embeddings:
        wanted.append((OUTPUT_LAYER.name, None, WORD_EMBEDDINGS))  # the last of several stages holds its own copy
    for local, layer in enumerate(layout.stage_layers(stage, config.num_layers)):
        for tensor in layer_tensors(config.of_layer(layer)):
            here = f"decoder.layers.{local}."
            name = here + tensor.name if here + tensor.name in parameters else here + tensor.local_name
            wanted.append((name, layer, tensor))
    for name, layer, tensor in wanted:
        parameter = parameters.pop(name, None)
        if parameter is None:
            continue  # an outer tensor of another stage
        described = config.of_layer(layer)
        full = tensor.full_shape(described, layout)
        held = shard(tensor, full, layout.tensor, rank)
        fill(parameter, tensor, held, full[0], described, partial(_read, tensors, layer))
        if tensor.split != "none":  # else the norm of the gradients takes the shards for copies; megatron-core says so at
            parameter.tensor_model_parallel = True  # initialisation, which is left out here
            parameter.partition_dim, parameter.partition_stride = int(tensor.split == "cols"), 1
    close_files()
    if parameters:
        raise RuntimeError(f"parameters without a tensor in the checkpoint: {sorted(parameters)}")


def _read(tensors: TensorMap, layer: int | None, role: str, rows: range, cols: range) -> torch.Tensor:
    return tensors.read_block(TensorId(role, layer), rows, cols)


def fill(
    parameter: torch.nn.Parameter,
    tensor: MegatronTensor,
    held: Shard,
    full_rows: int,
    config: ModelConfig,
    read: Callable[[str, range, range], torch.Tensor],
) -> None:
    """Copy the role tensors' parts in a shard into its parameter.

    Args:
        config: as for ``sharding.layer_tensors``.
        held: what this rank holds of ``tensor``, which has ``full_rows`` rows over all ranks.
        read: (role, rows, columns) → that block of the role tensor.
    """
    target = parameter.data.view(held.shape)
    target.zero_()  # the vocabulary's padding
    for role, stored, row, col, rows, cols in patches(tensor, config, full_rows, held):
        block = read(role, range(row, row + rows), range(col, col + cols))
        target[stored : stored + rows].copy_(block.reshape(rows, -1))
