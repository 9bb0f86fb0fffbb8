"""Layers of transformers, one at a time, in one process. Imports no megatron-core."""

from __future__ import annotations

from dataclasses import replace
from typing import Callable

import torch
from torch import Tensor, nn

from megatron_prune.arch.blocks.block import BlockKind
from megatron_prune.arch.model import ModelConfig
from megatron_prune.arch.tensors import layer_roles
from megatron_prune.errors import InputError
from megatron_prune.families.family import FAMILIES, Family, kin
from megatron_prune.runtime.rotary import angles, inverse_frequencies
from megatron_prune.runtime.stage import OpenLayer, Read
from megatron_prune.runtime.stock_class import stock_class, stock_config


class HuggingFaceStage:
    """Layers of a family's own class; this process holds them whole, and all samples.

    Args:
        family: of the model; where its class refuses a layer's shape, one of its kin gives the layer.
        seq_length: the most tokens of a sample.
    """

    rank, ranks, copy, copies = 0, 1, 0, 1

    def __init__(self, family: Family, *, dtype: torch.dtype, seq_length: int):
        self._family, self._dtype, self._seq_length = family, dtype, seq_length
        self.device = torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")

    def layer(self, config: ModelConfig) -> OpenLayer:
        return HuggingFaceLayer(config, able_family(self._family, config), self.device, self._dtype, self._seq_length)

    def gather(self, local: Tensor) -> Tensor:
        return local

    def gather_rows(self, local: Tensor, extent: int) -> Tensor | None:
        return local.cpu()

    def share(self, extent: int) -> range:
        return range(extent)

    def sum_copies(self, value: Tensor) -> Tensor:
        return value

    def agreed(self, value: float) -> float:
        return value

    def spread(self, value: Tensor) -> Tensor:
        return value

    def close(self) -> None:
        pass


def able_family(family: Family, config: ModelConfig) -> Family:
    """``family``, or the first of the same architecture whose class can express ``config``.

    Raises:
        InputError: if none can.
    """
    for name in (family.name, *kin(config)):
        try:
            FAMILIES.get(name).check_expressible(config)
        except InputError:
            continue
        return FAMILIES.get(name)
    family.check_expressible(config)
    raise AssertionError("unreachable: the line above raises")


class HuggingFaceBlock:
    """A block of a decoder layer of transformers behind :class:`OpenBlock`; opens it. Its modules are found by the family's names.

    Args:
        module_of: role → the layer's module that holds it.
        positions: cos and sin, [1, tokens, head_dim].
    """

    def __init__(
        self,
        kind: BlockKind,
        config: ModelConfig,
        layer: nn.Module,
        module_of: Callable[[str], str],
        positions: tuple[Tensor, Tensor],
    ):
        self.kind, self._window, self._positions = kind, config.uniform("sliding_window"), positions
        self._norm = layer.get_submodule(module_of(kind.norm))
        holder, _, writer = module_of(kind.writer).rpartition(".")
        self._block = layer.get_submodule(holder)
        self._writer = getattr(self._block, writer)
        self._after = layer.get_submodule(module_of(kind.after_norm)) if config.after_norms else None
        setattr(self._block, writer, nn.Identity())

    def norm(self, stream: Tensor) -> Tensor:
        return self._norm(stream)

    def inside(self, normed: Tensor) -> Tensor:
        if not self.kind.mixes_tokens:
            return self._block(normed)
        tokens = normed.shape[1]
        positions = tuple(part[:, :tokens] for part in self._positions)
        return self._block(normed, position_embeddings=positions, attention_mask=self._mask(tokens))[0]

    def _mask(self, tokens: int) -> Tensor | None:
        """Who sees whom, bool [1, 1, tokens, tokens]; ``None`` is all that came before."""
        if self._window is None or tokens <= self._window:
            return None
        seen = torch.ones(1, 1, tokens, tokens, dtype=torch.bool, device=self._positions[0].device)
        return seen.tril().triu(1 - self._window)

    def write(self, inside: Tensor) -> Tensor:
        return self._writer(inside)

    def after(self, written: Tensor) -> Tensor:
        return written if self._after is None else self._after(written)


class HuggingFaceLayer:
    """A decoder layer of transformers behind :class:`OpenLayer`, its attention through ``scaled_dot_product_attention``."""

    def __init__(self, config: ModelConfig, family: Family, device: torch.device, dtype: torch.dtype, seq_length: int):
        self._config, self._family = replace(config, num_layers=1), family
        described = family.hf_config(self._config, None)
        with torch.device("meta"):  # neither an embedding nor first weights are wanted
            model = stock_class(described)(stock_config(described)).model
        layer = model.layers[0].to(dtype).to_empty(device=device).eval().requires_grad_(False)
        self._parameters = dict(layer.named_parameters())
        for name in self._parameters.keys() - {self._name(role) for role in layer_roles(self._config)}:
            self._parameters[name].zero_()  # Family.zeros
        turned = angles(inverse_frequencies(self._config).to(device), seq_length)[None]
        positions = turned.cos().to(dtype), turned.sin().to(dtype)
        module_of = lambda role: self._name(role).rpartition(".")[0]
        self.blocks = tuple(HuggingFaceBlock(kind, self._config, layer, module_of, positions) for kind in self._config.kinds)

    def load(self, read: Read, roles: set[str] | None = None) -> None:
        for role in layer_roles(self._config):
            if roles is None or role in roles:
                parameter = self._parameter(role).data
                matrix = parameter.view(len(parameter), -1)
                matrix.copy_(read(role, range(matrix.shape[0]), range(matrix.shape[1])).reshape(matrix.shape))

    def matrices(self, roles: set[str]) -> dict[tuple[str, ...], nn.Parameter]:
        return {(role,): self._parameter(role) for role in roles}

    def full(self, roles: set[str]) -> dict[str, Tensor]:
        return {role: self._parameter(role).detach().float().cpu().clone() for role in roles}

    def _parameter(self, role: str) -> nn.Parameter:
        return self._parameters[self._name(role)]

    def _name(self, role: str) -> str:
        """A role's name inside a layer."""
        return self._family.names[role].removeprefix(_PREFIX)


_PREFIX = "model.layers.{layer}."
"""What a layer's tensor names begin with (``families/family.py``)."""
