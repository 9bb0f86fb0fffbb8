"""The pass over the calibration text: every layer's statistics, one layer in memory at a time.

All samples of this process go through a layer before the next is read (``runtime/stage.py``). A finished layer's
file is on disk at once, so that a stopped pass goes on where it was: layers whose files are there are only run, not
measured again.
"""

from __future__ import annotations

from typing import Callable, Iterator

import torch
from torch import Tensor

from megatron_prune.arch.model import ModelConfig
from megatron_prune.arch.tensors import TensorId
from megatron_prune.checkpoint.tensor_map import TensorMap
from megatron_prune.errors import InputError
from megatron_prune.importance.moments import Moment
from megatron_prune.importance.sampled_rows import RowSums, sampled_tokens
from megatron_prune.importance.statistics import FINAL_SITE, ROWS, STREAM, LayerStatistics, SiteStatistics, Statistics, sites
from megatron_prune.runtime.ends import embed, final_norm_factors, norm
from megatron_prune.runtime.stage import Layers, OpenLayer, Read, Stage
from megatron_prune.runtime.world import World
from megatron_prune.text.tokens import Calibration

BATCH_TOKENS = 4096
"""Tokens that go through a layer together."""


class Samples:
    """This process's samples on their way through the layers.

    Attributes:
        stream: [samples, tokens, hidden] on the host, in the computing dtype: what enters the next layer.
        weights: float32 [samples, tokens]; 0 where a sample has ended.
        sample_weights: float64 [samples].
        tokens: int64 [samples, tokens].
        lengths: int64 [samples].
        numbers: int64 [samples], their places in the whole calibration.
    """

    def __init__(self, tensors: TensorMap, calibration: Calibration, stage: Stage, dtype: torch.dtype):
        mine = calibration.share(stage.copy, stage.copies)
        self.numbers = torch.arange(len(calibration.tokens))[stage.copy :: stage.copies]
        self.tokens, self.lengths, self.sample_weights = mine.tokens, mine.lengths, mine.weights
        inside = torch.arange(mine.tokens.shape[1])[None] < mine.lengths[:, None]
        self.weights = (inside * mine.weights[:, None]).float()
        self.stream = embed(tensors, mine.tokens, dtype)

    def batches(self) -> Iterator[slice]:
        """Groups of samples that go through a layer together."""
        each = max(1, BATCH_TOKENS // self.weights.shape[1])
        return (slice(start, start + each) for start in range(0, len(self.weights), each))


def layer_reader(tensors: TensorMap, layer: int) -> Read:
    """Blocks of a stored layer's role tensors."""
    return lambda role, rows, cols: tensors.read_block(TensorId(role, layer), rows, cols)


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
    samples = Samples(tensors, calibration, stage, dtype)
    check_finite(samples.stream, "the embedding", world)
    layers = Layers(stage, config)
    for layer in range(config.num_layers):
        layer_view = layers.at(layer)
        layer_view.load(layer_reader(tensors, layer))
        sums = None if done[layer] else _LayerSums(config.of_layer(layer), stage, moments, samples, calibration)
        for batch in samples.batches():
            samples.stream[batch] = _through(layer_view, samples, batch, sums, stage).to(samples.stream)
            progress(samples.weights[batch].numel())
        check_finite(samples.stream, f"layer {layer}", world)
        if sums is not None:
            found = sums.finish()
            world.on_main(lambda: found.save(statistics.path(layer)))
    if not done[-1]:
        found = _final(tensors, samples, stage, moments, calibration)
        check_finite(found.sites[FINAL_SITE].squares, "the final norm", world)
        world.on_main(lambda: found.save(statistics.path(None)))
    world.barrier()


def _through(layer: OpenLayer, samples: Samples, batch: slice, sums: _LayerSums | None, stage: Stage) -> Tensor:
    """Run a batch through a layer, showing what passes to ``sums``."""
    entered = stream = samples.stream[batch].to(stage.device)
    inside = None
    for block in layer.blocks:
        normed = block.norm(stream)
        inside = block.inside(normed)
        after = stream + block.after(block.write(inside))
        if sums:
            sums.add_norm(block.kind.norm, normed, stream, batch)
            sums.add(block.kind.inside, inside, batch, written=after)
        stream = after
    if sums:
        sums.add_ends(entered, stream, batch)
        sums.add_rows(entered, inside, batch)
    return stream


def check_finite(stream: Tensor, where: str, world: World) -> None:
    """Refuse a stream with NaN or infinity, on every process alike.

    Raises:
        InputError: naming the layer.
    """
    if not all(world.all_gather(is_finite(stream))):
        raise InputError(
            f"the output of {where} is not finite (NaN or infinity) on this text",
            do="look for broken weights with megatron-prune inspect --weights, or compute with --dtype fp32",
        )


def is_finite(values: Tensor) -> bool:
    """Whether no value is NaN or infinite: a sum tells, unless it overflows by itself."""
    return bool(values.sum(dtype=torch.float32).isfinite()) or bool(values.isfinite().all())


class SiteSums:
    """Sums over the tokens at one site, on their way to :class:`SiteStatistics`.

    Args:
        width: features over all ranks.
        local: whether every rank sees its own features only.
    """

    def __init__(self, stage: Stage, samples: Samples, width: int, *, local: bool, moment: bool):
        self._stage, self._samples, self._local = stage, samples, local
        held = len(stage.share(width)) if local else width
        self._vectors = torch.zeros(3, held, dtype=torch.float64, device=stage.device)
        self._moment = Moment(stage, width) if moment else None

    def add(self, value: Tensor, batch: slice, written: Tensor | None = None) -> None:
        """Add a batch, [samples, tokens, features].

        Args:
            written: the stream after the matrix that reads this, whose mean square evens tokens out in the second moment.
        """
        samples, weights = self._samples, self._samples.weights[batch].to(value.device)
        short = samples.lengths[batch] < value.shape[1]
        if short.any():
            value = value * (weights > 0)[..., None]
        each = samples.sample_weights[batch].to(value.device)
        exact = value.float()
        room = torch.empty_like(exact)
        sums = torch.stack(
            [
                exact.sum(dim=1),
                torch.mul(exact, exact, out=room).sum(dim=1),
                torch.abs(exact, out=room).sum(dim=1).div_(samples.lengths[batch].to(value.device)[:, None]).square_(),
            ]
        )
        self._vectors += torch.einsum("s,vsd->vd", each, sums.double())
        if self._moment is not None:
            full = self._stage.gather(value) if self._local else value
            even = weights if written is None else weights / written.float().square().mean(dim=-1)
            self._moment.add(full, even)

    def finish(self) -> SiteStatistics:
        """The sums over all processes, the same on each."""
        vectors = self._stage.gather(self._vectors) if self._local else self._vectors
        total, squares, means = self._stage.sum_copies(vectors.contiguous()).cpu()
        tokens = self._stage.sum_copies(self._samples.weights.double().sum().to(self._stage.device)).item()
        moment = None if self._moment is None else self._moment.whole()
        return SiteStatistics(tokens=tokens, total=total, squares=squares, sample_means=means, moment=moment)


class _LayerSums:
    """The sums of one layer: every site, and how alike its input and output are."""

    def __init__(self, config: ModelConfig, stage: Stage, moments: frozenset[str], samples: Samples, calibration: Calibration):
        self._stage, self._samples = stage, samples
        self._sites = {
            site: SiteSums(stage, samples, config.size(space), local=space != "hidden", moment=site in moments)
            for site, space in sites(config.kinds).items()
        }
        self._stream = Moment(stage, config.hidden_size) if STREAM in moments else None
        self._config = config
        self._cosines = torch.zeros((), dtype=torch.float64, device=stage.device)
        self._last = torch.zeros(len(calibration.tokens), config.hidden_size, dtype=torch.float32, device=stage.device)
        last = config.size(config.kinds[-1].inside_space) if config.kinds else 0
        self._rows = _rows(config, stage, moments, calibration, inside=last)

    def add(self, site: str, value: Tensor, batch: slice, written: Tensor | None = None) -> None:
        self._sites[site].add(value, batch, written)

    def add_norm(self, site: str, value: Tensor, stream: Tensor, batch: slice) -> None:
        self.add(site, value, batch)
        self.add_stream(stream, batch)

    def add_stream(self, stream: Tensor, batch: slice) -> None:
        if self._stream is not None:
            unit = norm(stream, self._config)
            self._stream.add(unit, self._samples.weights[batch].to(stream.device))

    def add_rows(self, stream: Tensor, inside: Tensor | None, batch: slice) -> None:
        if self._rows is not None:
            self._rows.add(self._samples.numbers[batch], stream, inside)

    def add_ends(self, before: Tensor, after: Tensor, batch: slice) -> None:
        weights = self._samples.weights[batch].to(before.device)
        cosines = torch.nn.functional.cosine_similarity(before.float(), after.float(), dim=-1)
        self._cosines += (cosines * weights).sum(dtype=torch.float64)
        ends = (self._samples.lengths[batch] - 1).to(before.device)
        rows = torch.arange(len(before), device=before.device)
        self._last[self._samples.numbers[batch].to(before.device)] = before[rows, ends].float()

    def finish(self) -> LayerStatistics:
        found = {site: sums.finish() for site, sums in self._sites.items()}
        tokens = self._stage.sum_copies(self._samples.weights.double().sum().to(self._stage.device)).item()
        similarity = self._stage.sum_copies(self._cosines).item() / tokens
        return LayerStatistics(
            sites=found,
            similarity=similarity,
            last=self._stage.sum_copies(self._last).cpu(),
            stream=None if self._stream is None else self._stream.whole(),
            rows=None if self._rows is None else self._rows.finish(),
        )


def _rows(
    config: ModelConfig, stage: Stage, moments: frozenset[str], calibration: Calibration, *, inside: int
) -> RowSums | None:
    if ROWS not in moments:
        return None
    places = sampled_tokens(calibration)
    return RowSums(stage, places, calibration.weights[places[:, 0]], hidden=config.hidden_size, inside=inside)


def _final(
    tensors: TensorMap, samples: Samples, stage: Stage, moments: frozenset[str], calibration: Calibration
) -> LayerStatistics:
    """The final norm's output, filed like a layer of one site."""
    config = tensors.config
    weight = final_norm_factors(tensors).to(stage.device, samples.stream.dtype)
    sums = SiteSums(stage, samples, config.hidden_size, local=False, moment=FINAL_SITE in moments)
    moment = Moment(stage, config.hidden_size) if STREAM in moments else None
    last = torch.zeros(len(calibration.tokens), config.hidden_size, dtype=torch.float32, device=stage.device)
    rows = _rows(config, stage, moments, calibration, inside=0)
    for batch in samples.batches():
        stream = samples.stream[batch].to(stage.device)
        unit = norm(stream, config)
        sums.add(unit * weight, batch)
        if rows is not None:
            rows.add(samples.numbers[batch], stream, None)
        if moment is not None:
            moment.add(unit, samples.weights[batch].to(stage.device))
        ends = (samples.lengths[batch] - 1).to(stage.device)
        last[samples.numbers[batch].to(stage.device)] = stream[torch.arange(len(stream), device=stage.device), ends].float()
    return LayerStatistics(
        sites={FINAL_SITE: sums.finish()},
        similarity=1.0,
        last=stage.sum_copies(last).cpu(),
        stream=None if moment is None else moment.whole(),
        rows=None if rows is None else rows.finish(),
    )
