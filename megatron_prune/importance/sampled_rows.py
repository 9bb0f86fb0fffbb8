"""What passes at a few tokens, the same ones at every layer and every layout."""

from __future__ import annotations

import torch
from torch import Tensor

from megatron_prune.importance.statistics import SampledRows
from megatron_prune.planning.amounts import SAMPLED_ROWS
from megatron_prune.runtime.stage import Stage
from megatron_prune.text.tokens import Calibration


def sampled_tokens(calibration: Calibration) -> Tensor:
    """(sample, position) of the tokens, int64 [rows, 2]: drawn evenly from all that are no padding, always the same."""
    inside = torch.arange(calibration.tokens.shape[1])[None] < calibration.lengths[:, None]
    places = inside.nonzero()
    order = torch.randperm(len(places), generator=torch.Generator().manual_seed(0))
    return places[order[:SAMPLED_ROWS].sort().values]


class RowSums:
    """The rows of one layer, gathered from the copies and ranks that see them.

    Args:
        places: of :func:`sampled_tokens`.
        weights: of the places, float64 [rows].
        hidden: width of the stream.
        inside: features of the input of the layer's last writer over all ranks; 0 at the final norm.
    """

    def __init__(self, stage: Stage, places: Tensor, weights: Tensor, *, hidden: int, inside: int):
        self._stage, self._places, self._weights = stage, places, weights
        empty = lambda width: torch.zeros(len(places), width, dtype=torch.float32, device=stage.device)
        self._stream = empty(hidden)
        self._inside = empty(len(stage.share(inside))) if inside else None

    def add(self, numbers: Tensor, stream: Tensor, inside: Tensor | None) -> None:
        """Add a batch.

        Args:
            numbers: its samples' places in the whole calibration, int64 [samples].
            stream: [samples, tokens, hidden].
            inside: [samples, tokens, this rank's].
        """
        row, sample = (self._places[:, :1] == numbers).nonzero(as_tuple=True)
        device, position = stream.device, self._places[row, 1].to(stream.device)
        row, sample = row.to(device), sample.to(device)
        self._stream[row] = stream[sample, position].float()
        if inside is not None:
            self._inside[row] = inside[sample, position].float()

    def finish(self) -> SampledRows:
        """The same on every process."""
        stream = self._stage.sum_copies(self._stream).cpu()
        if self._inside is None:
            return SampledRows(weights=self._weights, stream=stream)
        whole = self._stage.gather(self._stage.sum_copies(self._inside))
        return SampledRows(weights=self._weights, stream=stream, kernel=(whole @ whole.T).cpu())
