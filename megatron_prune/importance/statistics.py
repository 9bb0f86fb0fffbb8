"""What one pass over the calibration text leaves behind: sums over tokens at the input of every matrix, layer by layer.

Metrics are functions of these sums and of the weights, so that a new metric or a new target needs no new pass. All
values are full (not per rank), float64, by global unit id, and independent of how the pass was spread over ranks but for
the rounding of the forward pass.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Iterable

import torch
from torch import Tensor

from megatron_prune.arch.blocks.block import BLOCKS, BlockKind, kind_of
from megatron_prune.arch.model import ModelConfig
from megatron_prune.arch.tensors import FINAL_NORM, HEAD
from megatron_prune.files.tensor_file import TensorFile, open_tensors, require_finite, save_tensors

STREAM = "stream"
"""Asks for the second moment of the normalised stream at a layer's norms (:attr:`LayerStatistics.stream`)."""

ROWS = "rows"
"""Asks for what passes at a few sampled tokens (:class:`SampledRows`)."""

CROSS_ENTROPY = "cross_entropy"
"""The objective that sums of gradients are of where none is named beside the metric."""

FINAL_SITE = FINAL_NORM.role
"""The final norm's output, which the head reads."""


def sites(kinds: Iterable[BlockKind]) -> dict[str, str]:
    """What the matrices of blocks read (norms' outputs, and what is inside blocks) → its space."""
    return {site: space for kind in kinds for site, space in ((kind.norm, "hidden"), (kind.inside, kind.inside_space))}


SITES = sites(map(BLOCKS.get, BLOCKS.names()))
"""Those of every kind of block."""


def site_of(role: str) -> str | None:
    """The site that a matrix reads; ``None`` of a role that is none (a norm, a bias, the embedding)."""
    kind = kind_of(role)
    return kind.inputs.get(role) if kind else (FINAL_SITE if role == HEAD.role else None)


@dataclass(frozen=True, kw_only=True)
class SiteStatistics:
    """Sums over the tokens at one site; w is a token's weight (its source's share of the calibration).

    Attributes:
        tokens: sum of w.
        total: sum of w·x, float64 [dim].
        squares: sum of w·x², float64 [dim].
        sample_means: sum over samples of (the sample's weight · (mean over its tokens of \\|x\\|)²), float64 [dim].
        moment: sum of w·x xᵀ / mean square of the stream after the matrix that reads x, float64 [dim, dim]: every token
            counts alike, whatever its size (tokens of massive activation are most of the plain sum). At the norms, where
            all tokens are of one size, sum of w·x xᵀ. ``None`` where no metric asked for it.
    """

    tokens: float
    total: Tensor
    squares: Tensor
    sample_means: Tensor
    moment: Tensor | None = None


@dataclass(frozen=True, kw_only=True)
class SampledRows:
    """The same few tokens at every layer.

    Attributes:
        weights: of the tokens, float64 [rows].
        stream: what enters the layer there, float32 [rows, hidden].
        kernel: products of the inputs of the layer's last writer (``down``) of every two tokens, float32 [rows, rows]; ``None``
            at the final norm.
    """

    weights: Tensor
    stream: Tensor
    kernel: Tensor | None = None


@dataclass(frozen=True, kw_only=True)
class LayerStatistics:
    """Attributes:
    sites: site → sums.
    similarity: mean over tokens of the cosine between the layer's input and output, weighted.
    last: the layer's input at the last token of every sample, float32 [samples, hidden], by sample.
    stream: sum of w·x xᵀ over the layer's norms, x the stream divided by its root mean square (what a norm gives before
        its weight), float64 [hidden, hidden]; ``None`` where nobody asked for it.
    rows: sampled tokens; ``None`` where nobody asked for them.
    """

    sites: dict[str, SiteStatistics]
    similarity: float
    last: Tensor
    stream: Tensor | None = None
    rows: SampledRows | None = None

    def save(self, path: Path) -> None:
        """Write a safetensors file, whole or not at all.

        Raises:
            InputError: if a sum is not finite.
        """
        tensors = {"similarity": torch.tensor(self.similarity, dtype=torch.float64), "last": self.last}
        tensors |= {} if self.stream is None else {"stream": self.stream}
        if self.rows is not None:
            tensors |= {f"rows.{name}": value for name, value in vars(self.rows).items() if value is not None}
        for name, site in self.sites.items():
            tensors[f"{name}.tokens"] = torch.tensor(site.tokens, dtype=torch.float64)
            parts = {"total": site.total, "squares": site.squares, "sample_means": site.sample_means, "moment": site.moment}
            tensors |= {f"{name}.{part}": value for part, value in parts.items() if value is not None}
        require_finite(tensors, f"what was measured for {path.name}")
        replace_file(path, tensors)

    @classmethod
    def load(cls, path: Path, *, moments: bool = True) -> LayerStatistics:
        """Read the file; without ``moments`` these are left on disk.

        Raises:
            CheckpointError: if it is damaged.
        """
        with open_tensors(path, do=_AGAIN.format(path.parent)) as file:
            named = (name.split(".") for name in file.names)
            names = dict.fromkeys(parts[0] for parts in named if len(parts) == 2 and parts[0] != "rows")
            sites = {name: _read_site(file, name, moments) for name in names}
            stream = file.read("stream", torch.float64, (None, None)) if moments and "stream" in file.names else None
            similarity = file.read("similarity", torch.float64, ()).item()
            return cls(sites=sites, similarity=similarity, last=file.read("last", torch.float32, (None, None)), stream=stream)


def _read_site(file: TensorFile, name: str, moments: bool) -> SiteStatistics:
    read = lambda part, *shape: file.read(f"{name}.{part}", torch.float64, shape)
    total = read("total", None)
    dim, moment = len(total), moments and f"{name}.moment" in file.names
    return SiteStatistics(
        tokens=read("tokens").item(),
        total=total,
        squares=read("squares", dim),
        sample_means=read("sample_means", dim),
        moment=read("moment", dim, dim) if moment else None,
    )


_AGAIN = "remove {} and start again: what was measured is measured anew"


def read_all(path: Path, dtype: torch.dtype = torch.float64) -> dict[str, Tensor]:
    """The vectors of a file that :func:`replace_file` wrote; empty where there is none.

    Raises:
        CheckpointError: if it is damaged, or holds something else.
    """
    if not path.exists():
        return {}
    with open_tensors(path, do=_AGAIN.format(path.parent)) as file:
        return {name: file.read(name, dtype, (None,), finite=False) for name in file.names}


@dataclass(frozen=True, kw_only=True)
class Statistics:
    """The pass as a whole: one file per layer (``layer_0007.safetensors``), and one for the final norm (``final``).

    Attributes:
        folder: where the files are.
        config: the model's shape.
    """

    folder: Path
    config: ModelConfig
    _kept: dict = field(default_factory=dict, repr=False)

    def path(self, layer: int | None) -> Path:
        """File of a layer, or (``None``) of the final norm."""
        return self.folder / ("final.safetensors" if layer is None else f"layer_{layer:04}.safetensors")

    def layer(self, layer: int | None) -> LayerStatistics:
        """Sums of a layer without its second moments; read once."""
        if layer not in self._kept:
            self._kept[layer] = LayerStatistics.load(self.path(layer), moments=False)
        return self._kept[layer]

    def site(self, role: str, layer: int | None) -> SiteStatistics:
        """Sums at the input of a matrix."""
        return self.layer(layer).sites[site_of(role)]

    def moment(self, role: str, layer: int | None) -> Tensor:
        """Second moment at the input of a matrix, float64 [dim, dim], read from disk.

        Raises:
            KeyError: if the pass did not collect it.
        """
        return self._second_moment(layer, f"{site_of(role)}.moment")

    def _second_moment(self, layer: int | None, name: str) -> Tensor:
        """One of a layer's file: what else is in it stays on disk."""
        with open_tensors(path := self.path(layer), do=_AGAIN.format(self.folder)) as file:
            if name not in file.names:
                raise KeyError(f"no {name} in {path}")
            return file.read(name, torch.float64, (None, None))

    def rows(self, layer: int | None) -> SampledRows:
        """What was seen at the sampled tokens: layer ``num_layers`` is the final norm; read from disk once.

        Raises:
            KeyError: if the pass did not sample any.
        """
        if ("rows", layer) not in self._kept:
            path = self.path(None if layer == self.config.num_layers else layer)
            with open_tensors(path, do=_AGAIN.format(path.parent)) as file:
                if "rows.weights" not in file.names:
                    raise KeyError(f"no sampled tokens of layer {layer} in {self.folder}")
                weights = file.read("rows.weights", torch.float64, (None,))
                rows, single = len(weights), torch.float32
                stream = file.read("rows.stream", single, (rows, self.config.hidden_size))
                kernel = file.read("rows.kernel", single, (rows, rows)) if "rows.kernel" in file.names else None
            self._kept["rows", layer] = SampledRows(weights=weights, stream=stream, kernel=kernel)
        return self._kept["rows", layer]

    def stream_moment(self, final_share: float) -> Tensor:
        """Second moment of the normalised stream, a mean over all norms, float64 [hidden, hidden].

        Args:
            final_share: what the final norm counts, where every other counts 1.
        """
        norms = sum(len(self.config.of_layer(layer).kinds) for layer in range(self.config.num_layers))
        total = sum(self._second_moment(layer, STREAM) for layer in range(self.config.num_layers))  # one at a time in memory
        total = total + final_share * self._second_moment(None, STREAM)
        return total / (self.layer(None).sites[FINAL_SITE].tokens * (norms + final_share))

    def gradient(self, metric: str, axis: str, layer: int | None, objective: str = CROSS_ENTROPY) -> Tensor:
        """Sums over a unit's weights that a gradient metric left (``importance/gradients.py``), float64 [units].

        Args:
            metric: its spelling.

        Raises:
            KeyError: if the pass did not collect them.
        """
        if "gradients" not in self._kept:
            self._kept["gradients"] = read_all(self.folder / "gradients.safetensors")
        return self._kept["gradients"][gradient_key(metric, objective, axis, layer)]

    def losses(self) -> Tensor:
        """Mean losses without layer 0, 1, … and, last, of the whole model (``importance/losses.py``), float64 [layers + 1]."""
        return read_all(self.folder / "losses.safetensors")["losses"]


def gradient_key(metric: str, objective: str, axis: str, layer: int | None) -> str:
    """Name in ``gradients.safetensors``: ``snip.ffn.7``, ``snip.hidden.all``; of another objective ``snip@NAME.ffn.7``."""
    return f"{gradient_source(metric, objective)}.{axis}.{'all' if layer is None else layer}"


def gradient_source(metric: str, objective: str) -> str:
    """What the names of a metric's sums of gradients begin with."""
    return metric if objective == CROSS_ENTROPY else f"{metric}@{objective}"


def replace_file(path: Path, tensors: dict[str, Tensor]) -> None:
    """Write a safetensors file in one move: a stopped process leaves the old one, or none."""
    aside = path.with_suffix(".new")
    save_tensors(aside, tensors)
    aside.replace(path)
