"""Cutting: every role tensor keeps the rows and columns of the units that stay."""

from __future__ import annotations

from typing import Callable

import torch

from megatron_prune.arch.model import ModelConfig
from megatron_prune.arch.tensors import EMBEDDING, FINAL_NORM, HEAD, TensorId
from megatron_prune.axes.axis import AXES
from megatron_prune.files.region import Scratch
from megatron_prune.planning.plan import Plan
from megatron_prune.surgery.maps import SpaceMap, carried


class Cut:
    """A plan as a transformation of role tensors, for ``checkpoint/stream.py``.

    It works on full role tensors and knows nothing of ranks or formats: where the result is stored decides which rank
    holds what.
    """

    def __init__(self, plan: Plan, config: ModelConfig):
        self.config = plan.new_config(config)
        self._old, self._plan = config, plan
        shared = {"hidden": _selection(plan.hidden, config.size("hidden")), "vocab": _selection(plan.vocab, config.size("vocab"))}
        self._shared = {space: found for space, found in shared.items() if found is not None}
        self._maps: dict[int, dict[str, SpaceMap]] = {}

    def origin(self, tensor: TensorId) -> TensorId:
        """The tensor before pruning that ``tensor`` (numbered as after it) is cut from."""
        if tensor == HEAD and self._plan.untied:
            return EMBEDDING
        return tensor if tensor.layer is None else TensorId(tensor.role, self._plan.layers[tensor.layer].layer)

    def transform(self, tensor: TensorId, data: torch.Tensor, scratch: Scratch) -> torch.Tensor:
        """The kept rows and columns of a full tensor, in the plan's order; in memory of ``scratch``, or ``data`` itself."""
        if self._plan.rotated:
            raise RuntimeError("a rotated stream has no channels that stay: its plan is for surgery/refit.py")
        return self._rescaled(tensor, self._carried(tensor, data, scratch, lambda space: True))

    def units(self, tensor: TensorId, data: torch.Tensor, scratch: Scratch) -> torch.Tensor:
        """As :meth:`transform`, with all of the residual stream's channels."""
        return self._carried(tensor, data, scratch, lambda space: space != "hidden")

    def tokens(self, tensor: TensorId, data: torch.Tensor, scratch: Scratch) -> torch.Tensor:
        """The kept tokens' rows alone, of a model that is otherwise cut already."""
        return self._carried(tensor, data, scratch, lambda space: space == "vocab")

    def _carried(self, tensor: TensorId, data: torch.Tensor, scratch: Scratch, wanted: Callable[[str], bool]) -> torch.Tensor:
        maps = {space: found for space, found in self._of(tensor.layer).items() if wanted(space)}
        return carried(tensor.role, data, maps, scratch)

    def _of(self, layer: int | None) -> dict[str, SpaceMap]:
        """The maps of a layer's spaces, numbered as after the cut."""
        if layer is None:
            return self._shared
        if layer not in self._maps:
            self._maps[layer] = self._shared | self._of_layer(layer)
        return self._maps[layer]

    def _of_layer(self, layer: int) -> dict[str, SpaceMap]:
        """An axis that is named after a space says which of its elements stay."""
        entry, found = self._plan.layers[layer], {}
        old = self._old.of_layer(entry.layer)
        for axis in map(AXES.get, AXES.names()):
            units = entry.units(axis.name) if axis.per_layer else None
            if units is not None:
                each = axis.owns(old)[axis.name]
                elements = (torch.tensor(units, dtype=torch.long)[:, None] * each + torch.arange(each)).flatten()
                found[axis.name] = SpaceMap.select(elements, old.size(axis.name))
        return found

    def _rescaled(self, tensor: TensorId, data: torch.Tensor) -> torch.Tensor:
        """The ends of the stream take up what the class multiplies a narrower embedding by less (:func:`embedding_gain`)."""
        gain = embedding_gain(self._old, self.config)
        if gain == 1.0:
            return data
        if tensor == EMBEDDING:
            return (data.double() * gain).to(data.dtype)
        if tensor == FINAL_NORM and self.config.tie_embeddings:
            offset = self.config.norm_offset
            return ((data.double() + offset) / gain - offset).to(data.dtype)
        return data


def embedding_gain(old: ModelConfig, new: ModelConfig) -> float:
    """What the embedding is multiplied by so that the stream begins as it did: models that scale it do so by √hidden_size.

    A tied head would give logits so much larger; the final norm is divided by it.
    """
    return (old.hidden_size / new.hidden_size) ** 0.5 if old.scaled_embedding else 1.0


def _selection(units: list[int] | None, size: int) -> SpaceMap | None:
    return None if units is None else SpaceMap.select(torch.tensor(units, dtype=torch.long), size)
