"""The pass over the calibration text: every layer's statistics, one layer in memory at a time.

All samples of this process go through a layer before the next is read (``walk.py``). A finished layer's
file is on disk at once, so that a stopped pass goes on where it was: layers whose files are there are only run, not
measured again.
"""

from __future__ import annotations

from typing import Callable

import torch
from torch import Tensor

from megatron_prune.arch.model import ModelConfig
from megatron_prune.checkpoint.tensor_map import TensorMap
from megatron_prune.importance.moments import Moment
from megatron_prune.importance.sampled_rows import RowSums, sampled_tokens
from megatron_prune.importance.statistics import FINAL_SITE, ROWS, STREAM, LayerStatistics, SiteStatistics, Statistics, sites
from megatron_prune.importance.walk import Walk, check_finite
from megatron_prune.runtime.ends import final_norm_factors, norm
from megatron_prune.runtime.stage import OpenBlock, Stage
from megatron_prune.runtime.world import World
from megatron_prune.text.tokens import Calibration


def collect(
    tensors: TensorMap,
    calibration: Calibration,
    stage: Stage,
    statistics: Statistics,
    moments: frozenset[str],
    world: World,
    *,
    dtype: torch.dtype = torch.float32,
    progress: Callable[[int], None] = lambda count: None,
) -> None:
    """Fill ``statistics.folder`` with what is not there yet; every process takes part.

    Args:
        moments: sites whose second moments are wanted.
        dtype: what to compute in.
        progress: called with the number of tokens that went through a layer.

    Raises:
        InputError: naming the layer whose output is not finite.
    """
    config = tensors.config
    parts = [*range(config.num_layers), None]
    done = world.all_gather([statistics.path(part).exists() for part in parts])[0]
    if all(done):
        return
    walk = Walk(tensors, calibration, stage, world, dtype=dtype, progress=progress)
    walk.check("the embedding")
    for layer in range(config.num_layers):
        opened = walk.opened(layer)
        sums = None if done[layer] else _LayerSums(config.of_layer(layer), walk, moments, calibration)
        walk.take(opened.blocks, sums)
        walk.check(f"layer {layer}")
        if sums is not None:
            found = sums.finish()
            world.on_main(lambda: found.save(statistics.path(layer)))
    if not done[-1]:
        found = _final(tensors, walk, moments, calibration)
        check_finite(found.sites[FINAL_SITE].squares, "the final norm", world)
        world.on_main(lambda: found.save(statistics.path(None)))
    world.barrier()


class SiteSums:
    """Sums over the tokens at one site, on their way to :class:`SiteStatistics`.

    Args:
        width: features over all ranks.
        local: whether every rank sees its own features only.
    """

    def __init__(self, walk: Walk, width: int, *, local: bool, moment: bool):
        stage = walk.stage
        self._stage, self._walk, self._local = stage, walk, local
        held = len(stage.share(width)) if local else width
        self._vectors = torch.zeros(3, held, dtype=torch.float64, device=stage.device)
        self._moment = Moment(stage, width) if moment else None

    def add(self, value: Tensor, batch: slice, written: Tensor | None = None) -> None:
        """Add a batch, [samples, tokens, features].

        Args:
            written: the stream after the matrix that reads this, whose mean square evens tokens out in the second moment.
        """
        walk, weights = self._walk, self._walk.weights[batch].to(value.device)
        short = walk.lengths[batch] < value.shape[1]
        if short.any():
            value = value * (weights > 0)[..., None]
        each = walk.sample_weights[batch].to(value.device)
        exact = value.float()
        room = torch.empty_like(exact)
        sums = torch.stack(
            [
                exact.sum(dim=1),
                torch.mul(exact, exact, out=room).sum(dim=1),
                torch.abs(exact, out=room).sum(dim=1).div_(walk.lengths[batch].to(value.device)[:, None]).square_(),
            ]
        )
        self._vectors += torch.einsum("s,vsd->vd", each, sums.double())
        if self._moment is not None:
            full = self._stage.gather(value) if self._local else value
            even = weights if written is None else walk.evened(weights, written)
            self._moment.add(full, even)

    def finish(self) -> SiteStatistics:
        """The sums over all processes, the same on each."""
        vectors = self._stage.gather(self._vectors) if self._local else self._vectors
        total, squares, means = self._stage.sum_copies(vectors.contiguous()).cpu()
        tokens = self._stage.sum_copies(self._walk.weights.double().sum().to(self._stage.device)).item()
        moment = None if self._moment is None else self._moment.whole()
        return SiteStatistics(tokens=tokens, total=total, squares=squares, sample_means=means, moment=moment)


class _LayerSums:
    """The sums of one layer: every site, and how alike its input and output are (an ``Onlooker``)."""

    def __init__(self, config: ModelConfig, walk: Walk, moments: frozenset[str], calibration: Calibration):
        self._walk, self._config, stage = walk, config, walk.stage
        self._sites = {
            site: SiteSums(walk, config.size(space), local=space != "hidden", moment=site in moments)
            for site, space in sites(config.kinds).items()
        }
        self._stream = Moment(stage, config.hidden_size) if STREAM in moments else None
        self._cosines = torch.zeros((), dtype=torch.float64, device=stage.device)
        self._last = _last(walk, walk.stream)
        inside = config.size(config.kinds[-1].inside_space)
        self._rows = _rows(walk, moments, calibration, inside=inside)
        self._entered: Tensor | None = None

    def see(self, block: OpenBlock, stream: Tensor, normed: Tensor, inside: Tensor, after: Tensor, batch: slice) -> None:
        kind, weights = block.kind, self._walk.weights[batch].to(stream.device)
        if kind is self._config.kinds[0]:
            self._entered = stream
        self._sites[kind.norm].add(normed, batch)
        self._sites[kind.inside].add(inside, batch, written=after)
        if self._stream is not None:
            self._stream.add(norm(stream, self._config), weights)
        if kind is self._config.kinds[-1]:
            cosines = torch.nn.functional.cosine_similarity(self._entered.float(), after.float(), dim=-1)
            self._cosines += (cosines * weights).sum(dtype=torch.float64)
            if self._rows is not None:
                self._rows.add(self._walk.numbers[batch], self._entered, inside)

    def finish(self) -> LayerStatistics:
        stage = self._walk.stage
        found = {site: sums.finish() for site, sums in self._sites.items()}
        tokens = stage.sum_copies(self._walk.weights.double().sum().to(stage.device)).item()
        return LayerStatistics(
            sites=found,
            similarity=stage.sum_copies(self._cosines).item() / tokens,
            last=stage.sum_copies(self._last).cpu(),
            stream=None if self._stream is None else self._stream.whole(),
            rows=None if self._rows is None else self._rows.finish(),
        )


def _last(walk: Walk, stream: Tensor) -> Tensor:
    """The stream at the last token of this process's samples, in their places among all, float32 [samples, hidden]."""
    found = torch.zeros(walk.count, stream.shape[-1], dtype=torch.float32)
    found[walk.numbers] = stream[torch.arange(len(stream)), walk.lengths - 1].float()
    return walk.on_device(found)


def _rows(walk: Walk, moments: frozenset[str], calibration: Calibration, *, inside: int) -> RowSums | None:
    if ROWS not in moments:
        return None
    places = sampled_tokens(calibration)
    hidden = walk.stream.shape[-1]
    return RowSums(walk.stage, places, calibration.weights[places[:, 0]], hidden=hidden, inside=inside)


def _final(tensors: TensorMap, walk: Walk, moments: frozenset[str], calibration: Calibration) -> LayerStatistics:
    """The final norm's output, filed like a layer of one site."""
    config, stage = tensors.config, walk.stage
    weight = final_norm_factors(tensors).to(stage.device, walk.stream.dtype)
    sums = SiteSums(walk, config.hidden_size, local=False, moment=FINAL_SITE in moments)
    moment = Moment(stage, config.hidden_size) if STREAM in moments else None
    rows = _rows(walk, moments, calibration, inside=0)
    for batch in walk.batches():
        stream = walk.on_device(walk.stream[batch])
        unit = norm(stream, config)
        sums.add(unit * weight, batch)
        if rows is not None:
            rows.add(walk.numbers[batch], stream, None)
        if moment is not None:
            moment.add(unit, walk.on_device(walk.weights[batch]))
    return LayerStatistics(
        sites={FINAL_SITE: sums.finish()},
        similarity=1.0,
        last=stage.sum_copies(_last(walk, walk.stream)).cpu(),
        stream=None if moment is None else moment.whole(),
        rows=None if rows is None else rows.finish(),
    )
