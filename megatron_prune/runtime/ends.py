"""The two ends of the stream: embeddings of tokens, and the final norm."""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn.functional import rms_norm

from megatron_prune.arch.model import ModelConfig
from megatron_prune.arch.tensors import EMBEDDING, FINAL_NORM
from megatron_prune.checkpoint.tensor_map import TensorMap

_ROWS = 1 << 14
"""Rows of the matrix that are read together."""


def embedding_scale(config: ModelConfig, dtype: torch.dtype) -> float:
    """What the embedding's output is multiplied by where it is computed in ``dtype``, which it is rounded to."""
    return torch.tensor(math.sqrt(config.hidden_size)).to(dtype).item() if config.scaled_embedding else 1.0


def embed(tensors: TensorMap, tokens: Tensor, dtype: torch.dtype) -> Tensor:
    """The stream that tokens begin with, [..., hidden], reading the matrix a range of rows at a time."""
    config = tensors.config
    used, places = tokens.unique(return_inverse=True)
    rows = torch.empty(len(used), config.hidden_size, dtype=dtype)
    for start in range(0, config.vocab_size, _ROWS):
        here = (used >= start) & (used < start + _ROWS)
        if here.any():
            block = tensors.read_block(EMBEDDING, range(start, min(start + _ROWS, config.vocab_size)))
            rows[here] = block[used[here] - start].to(dtype)
    return scaled(rows, config)[places]


def scaled(rows: Tensor, config: ModelConfig) -> Tensor:
    """Rows of the embedding as they enter the stream."""
    return rows * embedding_scale(config, rows.dtype) if config.scaled_embedding else rows


def norm(stream: Tensor, config: ModelConfig) -> Tensor:
    """The stream divided by its root mean square, token by token: what a norm gives before its weight."""
    return rms_norm(stream, stream.shape[-1:], eps=config.norm_epsilon)


def final_norm_factors(tensors: TensorMap) -> Tensor:
    """What the final norm multiplies channels by, [hidden]: its weight, or one more (:attr:`ModelConfig.norm_offset`)."""
    weight = tensors.read_block(FINAL_NORM, range(tensors.config.hidden_size))
    return weight.float() + tensors.config.norm_offset if tensors.config.norm_offset else weight
