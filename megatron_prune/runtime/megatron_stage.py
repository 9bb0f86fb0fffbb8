"""Layers of megatron-core, one at a time, tensor-parallel.

Pipeline stages would have nothing to do at the same time, so the ranks of a run are TP × copies here: what is a stage in
training is one more data-parallel copy.
"""

from __future__ import annotations

from dataclasses import replace

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.tensor_parallel.layers import RowParallelLinear
from megatron.core.tensor_parallel.mappings import gather_from_tensor_model_parallel_region
from megatron.core.transformer.spec_utils import build_module
from torch import Tensor, nn

from megatron_prune.arch.blocks.block import BlockKind
from megatron_prune.arch.model import ModelConfig
from megatron_prune.arch.sharding import ParallelLayout, layer_tensors, patches, shard
from megatron_prune.arch.tensors import tensor_shape
from megatron_prune.errors import InputError
from megatron_prune.runtime import cpu
from megatron_prune.runtime.core_config import transformer_config
from megatron_prune.runtime.layers import local_layer_spec
from megatron_prune.runtime.model import fill, start_parallel, stop_parallel
from megatron_prune.runtime.rotary import angles, inverse_frequencies
from megatron_prune.runtime.stage import OpenLayer, Read
from megatron_prune.runtime.world import World


class MegatronStage:
    """Layers of megatron-core, tensor-parallel over ``layout.tensor`` ranks; all other ranks are copies."""

    def __init__(self, layout: ParallelLayout, world: World, *, dtype: torch.dtype, seq_length: int):
        stop_parallel()
        self._world, self._layout = world, replace(layout, pipeline=1)
        start_parallel(self._layout, world)
        self._dtype, self._seq_length = dtype, seq_length
        self.device = torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")
        self.rank, self.ranks = parallel_state.get_tensor_model_parallel_rank(), layout.tensor
        self.copy, self.copies = parallel_state.get_data_parallel_rank(), parallel_state.get_data_parallel_world_size()

    def layer(self, config: ModelConfig) -> OpenLayer:
        return MegatronLayer(config, self._layout, self._world, self.device, self._dtype, self._seq_length)

    def gather(self, local: Tensor) -> Tensor:
        if self.ranks == 1:
            return local
        with cpu.stand_in():
            return gather_from_tensor_model_parallel_region(local.contiguous())

    def gather_rows(self, local: Tensor, extent: int) -> Tensor | None:
        if self.copy:
            return None
        local = local.cpu().contiguous()
        if self.ranks == 1:
            return local
        processes = dist.get_process_group_ranks(parallel_state.get_tensor_model_parallel_group())
        if self.rank:
            dist.send(local, processes[0])
            return None
        whole = local.new_empty(extent, *local.shape[1:])
        whole[: len(local)] = local
        for rank in range(1, self.ranks):
            dist.recv(whole[self._share_of(rank, extent)], processes[rank])
        return whole

    def share(self, extent: int) -> range:
        return range(extent)[self._share_of(self.rank, extent)]

    def _share_of(self, rank: int, extent: int) -> slice:
        return slice(extent * rank // self.ranks, extent * (rank + 1) // self.ranks)

    def sum_copies(self, value: Tensor) -> Tensor:
        if self.copies > 1:
            dist.all_reduce(value, group=parallel_state.get_data_parallel_group())
        return value

    def agreed(self, value: float) -> float:
        return self._world.all_gather(value)[0]

    def spread(self, value: Tensor) -> Tensor:
        return self._world.spread(value)

    def close(self) -> None:
        """Take the process groups down."""
        stop_parallel()


class _Open(nn.Module):
    """Stands where a row-parallel matrix was and hands its input on."""

    def forward(self, value: Tensor) -> tuple[Tensor, None]:
        return value, None


class MegatronBlock:
    """A block of megatron-core's TransformerLayer behind :class:`OpenBlock`; opens it."""

    def __init__(self, kind: BlockKind, layer: nn.Module, positions: Tensor):
        self.kind, self._positions = kind, positions if kind.mixes_tokens else None
        self._norm = layer.get_submodule(kind.tensor_of(kind.norm).module)
        holder, _, writer = kind.tensor_of(kind.writer).module.rpartition(".")
        self._block = layer.get_submodule(holder)
        self._writer = getattr(self._block, writer)
        self._after = getattr(self._writer, "post_layernorm", None)
        setattr(self._block, writer, _Open())

    def norm(self, stream: Tensor) -> Tensor:
        return _run(self._norm, stream)

    def inside(self, normed: Tensor) -> Tensor:
        if self._positions is None:
            return _run(lambda x: self._block(x)[0], normed)
        positions = self._positions[: normed.shape[1]]
        return _run(lambda x: self._block(x, attention_mask=None, rotary_pos_emb=positions)[0], normed)

    def write(self, inside: Tensor) -> Tensor:
        return _run(lambda x: RowParallelLinear.forward(self._writer, x)[0], inside)

    def after(self, written: Tensor) -> Tensor:
        return written if self._after is None else _run(self._after, written)


def _run(function, value: Tensor) -> Tensor:
    """Apply megatron-core's [tokens, samples, features] function to [samples, tokens, features]."""
    with cpu.stand_in():
        return function(value.transpose(0, 1)).transpose(0, 1)


class MegatronLayer:
    """megatron-core's TransformerLayer behind :class:`OpenLayer`."""

    def __init__(
        self,
        config: ModelConfig,
        layout: ParallelLayout,
        world: World,
        device: torch.device,
        dtype: torch.dtype,
        seq_length: int,
    ):
        self._config, self._layout, self._world = replace(config, num_layers=1), layout, world
        with cpu.stand_in():
            core = transformer_config(self._config, layout, dtype)
            layer = build_module(local_layer_spec(self._config), config=core, layer_number=1)
            layer = layer.to(device).eval().requires_grad_(False)
        self._parameters = dict(layer.named_parameters())
        positions = angles(inverse_frequencies(self._config).to(device), seq_length)[:, None, None]
        self.blocks = tuple(MegatronBlock(kind, layer, positions) for kind in self._config.kinds)

    def load(self, read: Read, roles: set[str] | None = None) -> None:
        rank, error = parallel_state.get_tensor_model_parallel_rank(), None
        try:
            for tensor in layer_tensors(self._config):
                if roles is None or set(tensor.roles) & roles:
                    full = tensor.full_shape(self._config, self._layout)
                    held = shard(tensor, full, self._layout.tensor, rank)
                    fill(self._parameters[tensor.local_name], tensor, held, full[0], self._config, read)
        except InputError as found:  # on the ranks that read a damaged part
            error = found
        self._world.agree(error)

    def matrices(self, roles: set[str]) -> dict[tuple[str, ...], nn.Parameter]:
        held = [tensor for tensor in layer_tensors(self._config) if set(tensor.roles) & roles]
        return {tensor.roles: self._parameters[tensor.local_name] for tensor in held}

    def full(self, roles: set[str]) -> dict[str, Tensor]:
        ranks = self._layout.tensor
        found = {role: torch.empty(tensor_shape(role, self._config)) for role in roles}
        for tensor in layer_tensors(self._config):
            if not set(tensor.roles) & roles:
                continue
            shape = tensor.full_shape(self._config, self._layout)
            mine = self._parameters[tensor.local_name].detach().cpu()
            parts: list[Tensor] = [mine] * ranks
            if ranks > 1:
                dist.all_gather_object(parts, mine, group=parallel_state.get_tensor_model_parallel_group())
            for number, part in enumerate(parts):
                held = shard(tensor, shape, ranks, number)
                for role, stored, row, col, rows, cols in patches(tensor, self._config, shape[0], held):
                    found[role][row : row + rows, col : col + cols] = part[stored : stored + rows]
        return found
