"""Layers of transformers, one at a time, in one process. Imports no megatron-core."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor, nn

from megatron_prune.arch.model import ModelConfig
from megatron_prune.arch.tensors import layer_roles
from megatron_prune.errors import InputError
from megatron_prune.families.family import FAMILIES, Family
from megatron_prune.runtime.stage import OpenLayer, Read


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
    for name in (family.name, *family.kin()):
        try:
            FAMILIES.get(name).check_expressible(config)
        except InputError:
            continue
        return FAMILIES.get(name)
    family.check_expressible(config)
    raise AssertionError("unreachable: the line above raises")


class HuggingFaceLayer:
    """A decoder layer of transformers behind :class:`OpenLayer`, its attention through ``scaled_dot_product_attention``."""

    def __init__(self, config: ModelConfig, family: Family, device: torch.device, dtype: torch.dtype, seq_length: int):
        from transformers import AutoConfig, AutoModelForCausalLM

        self._config, self._family = replace(config, num_layers=1), family
        described = AutoConfig.for_model(**family.hf_config(self._config, None))
        with torch.device("meta"):  # neither an embedding nor first weights are wanted
            model = AutoModelForCausalLM.from_config(described, attn_implementation="sdpa", trust_remote_code=False).model
        self._layer = model.layers[0].to(dtype).to_empty(device=device).eval().requires_grad_(False)
        rotary = type(model.rotary_emb)(model.config).to(device)
        places = torch.arange(seq_length, device=device)[None]
        self._positions = rotary(torch.empty(0, dtype=dtype, device=device), places)  # cos and sin, [1, tokens, head_dim]
        self._parameters = dict(self._layer.named_parameters())
        attention, mlp = self._layer.self_attn, self._layer.mlp
        self._o, self._down = attention.o_proj, mlp.down_proj
        attention.o_proj, mlp.down_proj = nn.Identity(), nn.Identity()

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
        return self._parameters[self._family.names[role].removeprefix(_PREFIX)]

    def norm_attention(self, stream: Tensor) -> Tensor:
        return self._layer.input_layernorm(stream)

    def context(self, normed: Tensor) -> Tensor:
        tokens = normed.shape[1]
        positions = tuple(part[:, :tokens] for part in self._positions)
        return self._layer.self_attn(normed, position_embeddings=positions, attention_mask=self._mask(tokens))[0]

    def _mask(self, tokens: int) -> Tensor | None:
        """Who sees whom, bool [1, 1, tokens, tokens]; ``None`` is all that came before."""
        window = self._config.sliding_window
        if window is None or tokens <= window:
            return None
        seen = torch.ones(1, 1, tokens, tokens, dtype=torch.bool, device=self._positions[0].device)
        return seen.tril().triu(1 - window)

    def write_attention(self, context: Tensor) -> Tensor:
        return self._o(context)

    def norm_mlp(self, stream: Tensor) -> Tensor:
        return self._layer.post_attention_layernorm(stream)

    def channels(self, normed: Tensor) -> Tensor:
        return self._layer.mlp(normed)

    def write_mlp(self, channels: Tensor) -> Tensor:
        return self._down(channels)


_PREFIX = "model.layers.{layer}."
"""What a layer's tensor names begin with (``families/family.py``)."""
