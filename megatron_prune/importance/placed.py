"""A running model's parameters, and where in the whole model each of them is."""

from __future__ import annotations

from typing import Iterator, NamedTuple

from megatron.core import parallel_state
from torch import nn

from megatron_prune.arch.sharding import (
    OUTPUT_LAYER,
    WORD_EMBEDDINGS,
    MegatronTensor,
    Patch,
    layer_tensors,
    outer_tensors,
    patches,
    shard,
)
from megatron_prune.runtime.model import RunningModel


class Placed(NamedTuple):
    """A parameter of this rank: its shard of ``tensor`` in a global ``layer``.

    ``is_copy``: it is the last stage's copy of embeddings that the first stage holds.
    """

    parameter: nn.Parameter
    tensor: MegatronTensor
    layer: int | None
    is_copy: bool = False

    @property
    def depth(self) -> float:
        """Its place in the order of the forward pass."""
        if self.layer is not None:
            return self.layer
        return -1.0 if self.tensor is WORD_EMBEDDINGS else float("inf")

    def __str__(self) -> str:
        roles = ", ".join(self.tensor.roles)
        return roles if self.layer is None else f"layer {self.layer} {roles}"

    def patches(self, model: RunningModel) -> Iterator[Patch]:
        """The rectangles of role tensors in it."""
        config = model.config.of_layer(self.layer)
        full = self.tensor.full_shape(config, model.layout)
        held = shard(self.tensor, full, model.layout.tensor, parallel_state.get_tensor_model_parallel_rank())
        return patches(self.tensor, config, full[0], held)


def placed_parameters(model: RunningModel) -> Iterator[Placed]:
    """Every parameter of this rank, embedding first."""
    config, parameters = model.config, dict(model.module.named_parameters())
    for tensor in outer_tensors(config):
        if tensor.name in parameters:
            yield Placed(parameters[tensor.name], tensor, None)
    if config.tie_embeddings and OUTPUT_LAYER.name in parameters:
        yield Placed(parameters[OUTPUT_LAYER.name], WORD_EMBEDDINGS, None, is_copy=True)
    stage = parallel_state.get_pipeline_model_parallel_rank()
    for local, layer in enumerate(model.layout.stage_layers(stage, config.num_layers)):
        for tensor in layer_tensors(config.of_layer(layer)):
            here = f"decoder.layers.{local}."
            name = here + tensor.name if here + tensor.name in parameters else here + tensor.local_name
            yield Placed(parameters[name], tensor, layer)
