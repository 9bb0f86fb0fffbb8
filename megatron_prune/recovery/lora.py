"""Low-rank adapters on the column- and row-parallel layers (Hu et al. 2021, arXiv 2106.09685), one for every role matrix.

A role's update is ``alpha / r · B · A`` with A [r, in] and B [out, r], as peft has it, whatever Megatron fuses. Of a
column-parallel layer A is whole on every rank and B holds the rank's rows; of a row-parallel layer A holds its columns and
B is whole. What passes between A and B is r numbers a token, and goes through megatron-core's mappings. Where ranks share a
KV group, a rank's rows of the fused queries, keys and values are no rows of each role alike: there B is whole as well.
"""

from __future__ import annotations

import math
from typing import Any, Iterator

import torch
import xxhash
from megatron.core import parallel_state
from megatron.core.dist_checkpointing import ShardedTensor
from megatron.core.tensor_parallel import get_cuda_rng_tracker
from megatron.core.tensor_parallel.mappings import (
    copy_to_tensor_model_parallel_region,
    gather_from_sequence_parallel_region,
    reduce_from_tensor_model_parallel_region,
    reduce_scatter_to_sequence_parallel_region,
)
from megatron.core.utils import make_sharded_tensor_for_checkpoint, make_tp_sharded_tensor_for_checkpoint
from torch import Tensor, nn

from megatron_prune.arch.adapter import AdapterConfig
from megatron_prune.arch.blocks.block import MegatronTensor
from megatron_prune.arch.model import ModelConfig
from megatron_prune.arch.sharding import layer_tensors
from megatron_prune.arch.tensors import tensor_shape
from megatron_prune.checkpoint.adapter import KEY
from megatron_prune.runtime.layers import NormedRowParallelLinear
from megatron_prune.runtime.model import RunningModel


class Adapter(nn.Module):
    """The updates of the role matrices that one parallel layer fuses.

    Args:
        layer: global number of the decoder layer.
        roles: that have an update, in the order in which the layer fuses them.
    """

    def __init__(
        self,
        lora: AdapterConfig,
        config: ModelConfig,
        layer: int,
        tensor: MegatronTensor,
        like: Tensor,
        *,
        sequence_parallel: bool,
    ):
        super().__init__()
        fused, columns = tensor.roles, tensor.split != "cols"
        self.layer, self._fused, self._columns, self._split_sequence = layer, fused, columns, sequence_parallel
        self.roles = [role for role in fused if role in lora.roles]
        self._scale, self._dropout = lora.scale, lora.dropout
        self.a, self.b = nn.ParameterDict(), nn.ParameterDict()
        ranks, rank = parallel_state.get_tensor_model_parallel_world_size(), parallel_state.get_tensor_model_parallel_rank()
        groups = config.units("kv_head")
        self._by_group = tensor.by_group
        self._shared = tensor.by_group and groups % ranks > 0
        split_b = columns and not self._shared
        self._groups = groups // (ranks if split_b else 1)
        self._rows = {role: tensor_shape(role, config)[0] // (ranks if split_b else 1) for role in fused}
        for role in self.roles:
            wide = tensor_shape(role, config)[1]
            a = first_a(role, layer, lora, wide)
            a = a if columns else a.chunk(ranks, dim=1)[rank].contiguous()
            self.a[role] = nn.Parameter(a.to(like))
            self.b[role] = nn.Parameter(torch.zeros(self._rows[role], lora.r, dtype=like.dtype, device=like.device))
            split, whole = (self.b[role], self.a[role]) if columns else (self.a[role], self.b[role])
            if not self._shared:
                split.tensor_model_parallel, split.partition_dim, split.partition_stride = True, 0 if columns else 1, 1
            whole.sequence_parallel = sequence_parallel

    def forward(self, inputs: Tensor) -> Tensor:
        """[tokens (/ TP), batch, in (/ TP)] → what is added to the layer's output, of its shape."""
        if self._dropout and self.training:
            inputs = self._drop(inputs)
        low = inputs @ torch.cat([self.a[role] for role in self.roles]).t()
        if not self._columns:
            mapping = (
                reduce_scatter_to_sequence_parallel_region if self._split_sequence else reduce_from_tensor_model_parallel_region
            )
            return (mapping(low) @ self.b[self.roles[0]].t()).mul_(self._scale)
        low = gather_from_sequence_parallel_region(low) if self._split_sequence else copy_to_tensor_model_parallel_region(low)
        parts = dict(zip(self.roles, low.split([self.a[role].shape[0] for role in self.roles], dim=-1)))
        if self._shared:
            return self._of_shared_groups(parts)
        outputs = [self._update(role, parts.get(role), low) for role in self._fused]
        if self._by_group:
            outputs = [each.unflatten(-1, (self._groups, -1)) for each in outputs]
            return torch.cat(outputs, dim=-1).flatten(-2)
        return torch.cat(outputs, dim=-1)

    def _of_shared_groups(self, parts: dict[str, Tensor]) -> Tensor:
        """Through the rank's rows of a B that holds all roles', each in its own columns."""
        # one gradient for all: the sum over the ranks' rows; megatron-core loses the sum of one that is not contiguous
        whole = copy_to_tensor_model_parallel_region(torch.cat([self.b[role] for role in self.roles]))
        b = dict(zip(self.roles, whole.split([self._rows[role] for role in self.roles])))
        blocks = [b[role] if role in b else whole.new_zeros(self._rows[role], 0) for role in self._fused]
        by_role = torch.block_diag(*blocks).split(list(self._rows.values()))
        fused = torch.cat([rows.unflatten(0, (self._groups, -1)) for rows in by_role], dim=1).flatten(0, 1)
        ranks, rank = parallel_state.get_tensor_model_parallel_world_size(), parallel_state.get_tensor_model_parallel_rank()
        own = fused.chunk(ranks)[rank]
        return (torch.cat([parts[role] for role in self.roles], dim=-1) @ own.t()).mul(self._scale)

    def _update(self, role: str, part: Tensor | None, like: Tensor) -> Tensor:
        if part is None:
            return like.new_zeros(*like.shape[:-1], self._rows[role])
        return (part @ self.b[role].t()).mul(self._scale)

    def _drop(self, inputs: Tensor) -> Tensor:
        """Where ranks hold different numbers they drop different ones, else the same."""
        if self._columns and not self._split_sequence:
            return nn.functional.dropout(inputs, self._dropout)
        with get_cuda_rng_tracker().fork():
            return nn.functional.dropout(inputs, self._dropout)

    def sharded_state(self) -> dict[str, ShardedTensor]:
        """megatron-core's description of the parameters by name, for a checkpoint that any layout reads."""
        described = {}
        for name, parameter in self.named():
            if getattr(parameter, "tensor_model_parallel", False):
                described[name] = make_tp_sharded_tensor_for_checkpoint(parameter, name, tp_axis=parameter.partition_dim)
            else:
                described[name] = make_sharded_tensor_for_checkpoint(parameter, name)
        return described

    def named(self) -> Iterator[tuple[str, nn.Parameter]]:
        """Name in a checkpoint, and parameter."""
        for role in self.roles:
            yield KEY.format(layer=self.layer, role=role, part="a"), self.a[role]
            yield KEY.format(layer=self.layer, role=role, part="b"), self.b[role]


def first_a(role: str, layer: int, lora: AdapterConfig, wide: int) -> Tensor:
    """A as training begins with it, float32 [r, wide]: the same at any parallel layout. B begins with zeros."""
    seed = xxhash.xxh64_intdigest(f"{lora.seed} {layer} {role}".encode()) >> 1
    bound = 1.0 / math.sqrt(wide)
    return torch.empty(lora.r, wide).uniform_(-bound, bound, generator=torch.Generator().manual_seed(seed))


def add_adapters(running: RunningModel, lora: AdapterConfig) -> list[Adapter]:
    """Freeze the model and hang an adapter on every layer that fuses a role of ``lora``; those of this rank's stage."""
    module, config = running.module, running.config
    module.requires_grad_(False)
    sequence_parallel = module.config.sequence_parallel
    stage = parallel_state.get_pipeline_model_parallel_rank()
    added = []
    for layer, block in zip(running.layout.stage_layers(stage, config.num_layers), module.decoder.layers):
        for tensor in layer_tensors(config.of_layer(layer)):
            if not set(tensor.roles) & set(lora.roles):
                continue
            base = block.get_submodule(tensor.module)
            described = config.of_layer(layer)
            adapter = Adapter(lora, described, layer, tensor, base.weight, sequence_parallel=sequence_parallel)
            base.add_module("adapter", adapter)
            if isinstance(base, NormedRowParallelLinear):  # W + s B A is under the norm
                base.beside = lambda inputs, adapter=adapter: adapter(inputs)  # no second name for its parameters
            else:
                base.register_forward_hook(_add)
            added.append(adapter)
    if module.pre_process and module.config.recompute_granularity == "full":
        module.embedding.register_forward_hook(lambda _, inputs, output: output.requires_grad_(True))  # or no layer is run again
    return added


def _add(base: nn.Module, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor | None]) -> tuple[Tensor, Tensor | None]:
    return output[0] + base.adapter(inputs[0]), output[1]
