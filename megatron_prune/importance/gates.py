"""Sums of squared gate gradients that hooks fill, and the passes that fill them with transformers."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Callable

import torch
from torch import Tensor, nn

from megatron_prune.arch.blocks.block import BlockKind
from megatron_prune.arch.model import ModelConfig
from megatron_prune.arch.tensors import TensorId
from megatron_prune.axes.axis import AXES
from megatron_prune.checkpoint.huggingface import read_config
from megatron_prune.errors import InputError, raise_all
from megatron_prune.families.family import family_of
from megatron_prune.importance.metric import GradientMetric
from megatron_prune.importance.statistics import CROSS_ENTROPY, Statistics, gradient_key, read_all, replace_file
from megatron_prune.runtime.stock_model import load_stock_model
from megatron_prune.text.tokens import Calibration


def owned(axis: str, kind: BlockKind, config: ModelConfig) -> int:
    """Features inside a block that one unit of an axis owns."""
    return AXES.get(axis).owns(config)[kind.inside_space]


class GateSums:
    """Sum over samples and tokens of (a · ∂L/∂a)² at a row-parallel matrix's input, L a sample's summed token losses.

    Args:
        width: consecutive features under one gate.
        weights: of the samples.
        terms: of how many each sample's functional is the mean (``Objective.terms``).

    Attributes:
        total: float64 [units of this rank]; ``None`` before the first sample.
    """

    def __init__(self, width: int, weights: list[float], terms: list[int]):
        self.total: Tensor | None = None
        self._width, self._samples = width, iter(zip(weights, terms))

    def watch(self, module: nn.Module, given: tuple[Tensor, ...]) -> None:
        """Forward pre-hook: wait for the gradient of the input, [tokens, 1, features]."""
        value = given[0]
        if self.total is None:
            self.total = torch.zeros(value.shape[-1] // self._width, dtype=torch.float64, device=value.device)
        value.register_hook(partial(self._add, value.detach(), *next(self._samples)))

    def _add(self, value: Tensor, weight: float, terms: int, gradient: Tensor) -> None:
        product = value.float() * gradient
        if self._width > 1:
            product = product.unflatten(-1, (-1, self._width)).sum(dim=-1)
        self.total.add_(product.mul_(terms).square_().sum(dim=(0, 1)), alpha=weight)


def collect_gates(
    metrics: list[GradientMetric],
    folder: Path,
    config: ModelConfig,
    calibration: Calibration,
    statistics: Statistics,
    *,
    dtype: torch.dtype,
    progress: Callable[[int], None] = lambda count: None,
) -> None:
    """Add to ``gradients.safetensors`` what it lacks of ``metrics``: backward passes of a Hugging Face model, one process.

    Args:
        metrics: of gates, and of cross-entropy.
        folder: Hugging Face directory of the model.
        progress: called with the number of tokens of every sample.

    Raises:
        InputError: if a gradient is not finite, naming the layer.
    """
    path = statistics.folder / "gradients.safetensors"
    found = read_all(path)
    there = {key.rsplit(".", 2)[0] for key in found}
    metrics = [metric for metric in metrics if metric.spelling not in there]
    if not metrics:
        return
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model = load_stock_model(folder, dtype=dtype).to(device).requires_grad_(False)
    raise_all(
        InputError,
        "there are no gradients where weights are not finite (NaN or infinity)",
        sorted(name for name, parameter in model.named_parameters() if not parameter.isfinite().all()),
        do="mend the checkpoint, or use a metric of weights only",
    )
    weights, terms = calibration.weights.tolist(), (calibration.lengths - 1).tolist()
    family, gates = family_of(read_config(folder)), {}
    for layer in range(config.num_layers):
        for kind in config.of_layer(layer).kinds:
            gates[kind, layer] = GateSums(owned(kind.axes[0], kind, config.of_layer(layer)), weights, terms)
            writer = family.tensor_name(TensorId(kind.writer, layer)).rpartition(".")[0]
            model.get_submodule(writer).register_forward_pre_hook(gates[kind, layer].watch)
    for tokens, length in zip(calibration.tokens, calibration.lengths.tolist()):
        tokens = tokens[None, :length].to(device)
        embedded = model.get_input_embeddings()(tokens).requires_grad_()
        logits = model(inputs_embeds=embedded, use_cache=False).logits
        torch.nn.functional.cross_entropy(logits[0, :-1].float(), tokens[0, 1:]).backward()
        progress(length)
    for (kind, layer), gate in gates.items():
        if not gate.total.isfinite().all():
            raise InputError(f"gradients of layer {layer} are not finite", do="compute with --dtype fp32")
        for axis in kind.axes:
            units = AXES.get(axis).count(config.of_layer(layer))
            total = gate.total.view(units, -1).sum(dim=1).cpu()
            found |= {gradient_key(m.spelling, CROSS_ENTROPY, axis, layer): total for m in metrics if axis in m.axes}
    replace_file(path, found)
