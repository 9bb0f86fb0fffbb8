"""Cutting: every role tensor keeps the rows and columns of the units that stay."""

from __future__ import annotations

from math import prod

import numpy as np
import torch

from megatron_prune.arch.blocks.block import spaces
from megatron_prune.arch.model import ModelConfig
from megatron_prune.arch.tensors import EMBEDDING, HEAD, TensorId
from megatron_prune.files.region import Scratch
from megatron_prune.planning.plan import LayerPlan, Plan


class Cut:
    """A plan as a transformation of role tensors, for ``checkpoint/stream.py``.

    It works on full role tensors and knows nothing of ranks or formats: where the result is stored decides which rank
    holds what.
    """

    def __init__(self, plan: Plan, config: ModelConfig):
        self.config = plan.new_config(config)
        self._plan = plan
        self._head_dim = config.size("head_dim")
        self._hidden, self._vocab = _index(plan.hidden), _index(plan.vocab)

    def origin(self, tensor: TensorId) -> TensorId:
        """The tensor before pruning that ``tensor`` (numbered as after it) is cut from."""
        if tensor == HEAD and self._plan.untied:
            return EMBEDDING
        return tensor if tensor.layer is None else TensorId(tensor.role, self._plan.layers[tensor.layer].layer)

    def transform(self, tensor: TensorId, data: torch.Tensor, scratch: Scratch) -> torch.Tensor:
        """The kept rows and columns of a full tensor, in the plan's order; in memory of ``scratch``, or ``data`` itself."""
        if self._plan.rotated:
            raise RuntimeError("a rotated stream has no channels that stay: its plan is for surgery/refit.py")
        return self._keep(tensor, data, scratch, spaces(tensor.role))

    def units(self, tensor: TensorId, data: torch.Tensor, scratch: Scratch) -> torch.Tensor:
        """As :meth:`transform`, with all of the residual stream's channels."""
        return self._keep(tensor, data, scratch, tuple("" if label == "hidden" else label for label in spaces(tensor.role)))

    def tokens(self, tensor: TensorId, data: torch.Tensor, scratch: Scratch) -> torch.Tensor:
        """The kept tokens' rows alone, of a model that is otherwise cut already."""
        return self._keep(tensor, data, scratch, tuple(label if label == "vocab" else "" for label in spaces(tensor.role)))

    def _keep(self, tensor: TensorId, data: torch.Tensor, scratch: Scratch, labels: tuple[str, ...]) -> torch.Tensor:
        entry = None if tensor.layer is None else self._plan.layers[tensor.layer]
        for dim, label in enumerate(labels):
            index = self._elements(label, entry)
            if index is not None:
                data = _take(data, dim, index, scratch)
        return data

    def _elements(self, label: str, entry: LayerPlan | None) -> torch.Tensor | None:
        """Kept elements of a dimension, ``None`` for all of them."""
        if label == "hidden":
            return self._hidden
        if label == "vocab":
            return self._vocab
        if entry is None or label not in ("ffn", "head", "kv_head"):
            return None
        units = _index(getattr(entry, label))
        if units is None or label == "ffn":
            return units
        return (units[:, None] * self._head_dim + torch.arange(self._head_dim)).flatten()


def _take(data: torch.Tensor, dim: int, index: torch.Tensor, scratch: Scratch) -> torch.Tensor:
    """``data.index_select(dim, index)`` into kept memory. Columns go through numpy, which is three times as fast."""
    shape = (*data.shape[:dim], len(index), *data.shape[dim + 1 :])
    out = scratch.take(f"cut {dim}", prod(shape), data.dtype).view(shape)
    if dim == 0:
        return torch.index_select(data, 0, index, out=out)
    bits = {2: torch.int16, 4: torch.int32, 8: torch.int64}[data.dtype.itemsize]
    np.take(data.view(bits).numpy(), index.numpy(), axis=1, out=out.view(bits).numpy(), mode="clip")
    return out


def _index(units: list[int] | None) -> torch.Tensor | None:
    return None if units is None else torch.tensor(units, dtype=torch.long)
