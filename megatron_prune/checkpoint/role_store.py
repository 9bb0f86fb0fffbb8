"""Role tensors on disk while a model is being re-fitted: one safetensors file per layer, one for what is outside them.

A finished part is in place at once (written under another name, then renamed), so that an interrupted run goes on with the
parts that are there.
"""

from __future__ import annotations

import os
from pathlib import Path

import torch

from megatron_prune.arch.model import ModelConfig
from megatron_prune.arch.sharding import Patch
from megatron_prune.arch.tensors import TensorId, full_shape, layer_roles, tensor_ids
from megatron_prune.checkpoint.safetensors_file import read_header
from megatron_prune.checkpoint.tensor_map import TensorMap
from megatron_prune.errors import CheckpointError
from megatron_prune.files.tensor_file import open_tensors, require_finite, save_tensors

_AGAIN = "remove the directory that it is in, and start again"


class RoleStore:
    """Args:
    folder: an existing directory.
    config: the shape of the model that is being made.
    """

    def __init__(self, folder: Path, config: ModelConfig):
        self.folder, self.config = folder, config

    def path(self, layer: int | None) -> Path:
        """File of a layer, or of the tensors outside the layers."""
        return self.folder / ("outer.safetensors" if layer is None else f"layer_{layer:04}.safetensors")

    def save(self, layer: int | None, weights: dict[str, torch.Tensor]) -> None:
        """File full role tensors by role.

        Raises:
            InputError: if one is not finite.
        """
        require_finite(weights, "what was fitted" + ("" if layer is None else f" of layer {layer}"))
        partial = self.path(layer).with_suffix(".partial")
        save_tensors(partial, weights)
        os.replace(partial, self.path(layer))

    def load(self, layer: int | None) -> dict[str, torch.Tensor]:
        """Role tensors of a finished part.

        Raises:
            CheckpointError: if one is missing, damaged or of another shape.
        """
        with open_tensors(self.path(layer), do=_AGAIN) as file:
            shape = lambda role: full_shape(TensorId(role, layer), self.config)
            return {role: file.read(role, torch.float32, shape(role)) for role in self._roles(layer)}

    def _roles(self, layer: int | None) -> list[str]:
        if layer is not None:
            return list(layer_roles(self.config.of_layer(layer)))
        return [tensor.role for tensor in tensor_ids(self.config) if tensor.layer is None]

    def tensors(self) -> TensorMap:
        """All parts as one model.

        Raises:
            CheckpointError: if a tensor is missing or of another shape.
        """
        found = TensorMap(self.config)
        for layer in (*range(self.config.num_layers), None):
            header = read_header(self.path(layer))
            for role in self._roles(layer):
                if role not in header:
                    raise CheckpointError(f"{self.path(layer)} lacks the tensor {role!r}", do=_AGAIN)
                region, _ = header[role]
                found.add(layer, region, [Patch(role, 0, 0, 0, region.rows, region.cols)])
        return found.validate(self.folder)
