"""Rotary positions (Su et al. 2021, arXiv 2104.09864) of a layer."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from megatron_prune.arch.model import ModelConfig


def inverse_frequencies(config: ModelConfig) -> Tensor:
    """Rotary frequencies of a layer, float32 [kv_channels / 2].

    ``base ** (-2i / d)``; scaled as ``config.rope_scaling`` says (see :class:`RopeScaling`): linear divides by the factor; llama3
    divides wavelengths above context / low_freq_factor, keeps those below context / high_freq_factor, and blends between.
    """
    d, scaling, base = config.kv_channels, config.uniform("rope_scaling"), config.uniform("rotary_base")
    if base is None:
        return torch.zeros(d // 2)  # turned by nothing
    frequencies = 1.0 / base ** (torch.arange(0, d, 2, dtype=torch.float32) / d)
    if scaling is None:
        return frequencies
    if scaling.kind == "linear":
        return frequencies / scaling.factor
    context = scaling.original_max_position_embeddings
    wavelength = 2 * math.pi / frequencies
    blend = (context / wavelength - scaling.low_freq_factor) / (scaling.high_freq_factor - scaling.low_freq_factor)
    blend = blend.clamp(0.0, 1.0)
    return (1 - blend) * frequencies / scaling.factor + blend * frequencies


def angles(frequencies: Tensor, length: int) -> Tensor:
    """Angle of every feature of a head at the positions from 0 on, float32 [length, kv_channels]: both halves rotate alike."""
    places = torch.arange(length, dtype=torch.float32, device=frequencies.device)
    return torch.outer(places, frequencies).repeat(1, 2)
