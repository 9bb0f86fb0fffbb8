"""Re-fitting: what stays learns, by least squares, to do what the whole did, then by a few gradient steps on each block's
own output. Layer by layer, stock output.

Two streams of the same tokens go through the model side by side, the dense one S and the pruned one Z (in the basis of the
pruned model). In every layer that stays, in order:

1. q, k and v (where the stream was cut): from the pruned norm's output to what the dense ones made of theirs;
2. ``o``: from the context that the pruned heads give to what brings Z to where S is after this attention;
3. gate and up, like q, k and v;
4. ``down``: from the pruned channels to what brings Z to S at the input of the next layer *that stays*: a cut block of
   layers is folded into the matrix before it.

After its last matrix, all matrices of an attention or feed-forward block that was cut are fitted together to the same
(``reconstruct.py``). What one matrix can not carry of a cut block of layers is left to the layers on either side: the layer
before it and the few that follow it, a window, are fitted together in the same way to the dense stream after the last of them
(as CBQ, Ding et al. 2023, arXiv 2312.07950, does across blocks that are quantised). Layers *before* the fold stay out of it: they
lower the error too, but unsettle tokens of massive activation (``docs/quality.md``).

Z is set to the dense stream before every block, so that each is fitted to the dense model's own statistics, and blocks that
are whole and in no window stay as they are. With ``sequential`` Z is what the layers before really left, and every block is fitted
to mend what they could not: more fitting, which follows the text at hand more closely than the model, but keeps errors from piling
up where a cut is severe (measured in ``docs/quality.md``).
Moments are accumulated under TP × DP (``importance/moments.py``) and solved by the first process; only the layer at hand, or those
of a window, are in memory.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Callable

import torch
from torch import Tensor

from megatron_prune.arch.tensors import TensorId, layer_roles
from megatron_prune.checkpoint.role_store import RoleStore
from megatron_prune.checkpoint.tensor_map import TensorMap
from megatron_prune.files.region import Scratch
from megatron_prune.importance.collect import BATCH_TOKENS, Samples, check_finite, layer_reader
from megatron_prune.importance.moments import Moment
from megatron_prune.planning.plan import Plan
from megatron_prune.runtime.stage import OpenLayer, Stage, reader
from megatron_prune.runtime.world import World
from megatron_prune.surgery.basis import Basis
from megatron_prune.surgery.cut import Cut
from megatron_prune.surgery.least_squares import fitted, scale
from megatron_prune.surgery.reconstruct import Examples, fitted_and_held_out, reconstruct
from megatron_prune.text.tokens import Calibration

AFTER = 4
"""Layers after a cut block that are fitted with the one before it."""
WINDOW_PASSES = 2
"""Passes over the text for a window of layers, where a block of its own takes one."""
Folds = list[tuple[Tensor, Tensor]]
"""Of every fold of the samples, A and T (``least_squares.py``), float64."""
READERS = {"input_norm": ("q", "k", "v"), "post_norm": ("gate", "up")}
"""Norm → the matrices that read its output."""


@dataclass(frozen=True, kw_only=True)
class Fit:
    """How to fit.

    Attributes:
        sequential: Z is what the pruned layers before left; else the dense stream.
        writers: ridge of ``o`` and ``down`` towards the cut matrices, as a share of the moment's mean diagonal.
        readers: the same for what reads the stream, where the stream is cut.
        passes: over the text in which all matrices of a cut block are fitted together (``reconstruct.py``); 0 for none.
    """

    sequential: bool = False
    writers: float | None = None
    readers: float | None = None
    passes: int = 4


class Refit:
    """One run; :meth:`run` fills ``store``.

    Args:
        tensors: the dense model.
        plan: what stays.
        basis: of the pruned stream.
        store: where finished layers go; those that are there already are used as they are.
    """

    def __init__(
        self,
        tensors: TensorMap,
        plan: Plan,
        basis: Basis,
        calibration: Calibration,
        stage: Stage,
        store: RoleStore,
        world: World,
        fit: Fit,
        *,
        dtype: torch.dtype = torch.float32,
    ):
        self._tensors, self._basis, self._stage, self._store = tensors, basis, stage, store
        self._world, self._fit = world, fit
        self._cut = Cut(plan, tensors.config)
        self._kept = [entry.layer for entry in plan.layers]
        self._samples = Samples(tensors, calibration, stage, dtype)
        self._pruned = basis.encoded(self._samples.stream).clone()
        self._folds = folds_of(calibration)
        self._dense = stage.layer(tensors.config)
        self._windows = windows_of(self._kept, tensors.config.num_layers)
        self._open = [stage.layer(store.config) for _ in range(max(map(len, self._windows)))]
        self._new = self._open[0]

    def work(self) -> int:
        """What :meth:`run` reports in all: tokens × layers of the dense model, and tokens × blocks × passes of joint fits."""
        each = map(self._joint_work, self._windows)
        return self._samples.tokens.numel() * self._tensors.config.num_layers + sum(each)

    def run(self, progress: Callable[[int], None] = lambda work: None) -> None:
        """Fit every layer that stays, then what is outside the layers; every process takes part.

        Args:
            progress: called with the share of :meth:`work` done since.

        Raises:
            InputError: naming a layer whose output is not finite.
        """
        self._progress = progress
        for layer in range(self._kept[0]):
            self._advance(layer)
        for window in self._windows:
            self._fit_window(window)
            self._world.barrier()
        folds = self._final_moments()
        outer = self._store.path(None)
        self._world.on_main(lambda: outer.exists() or self._store.save(None, self._outer(folds)))

    def loss(self, *, held_out: bool = False) -> float:
        """Mean next-token cross-entropy of the finished model on its samples, weighted, in nats; the same on every process.

        Args:
            held_out: on those alone that joint fits do not fit to.
        """
        outer, samples, chosen = self._store.load(None), self._samples, self._chosen(held_out)
        streams = outer["embedding"][samples.tokens[chosen]].to(samples.stream)
        for number in range(self._store.config.num_layers):
            self._new.load(reader(self._store.load(number)))
            for batch in torch.arange(len(chosen)).split(max(1, BATCH_TOKENS // streams.shape[1])):
                streams[batch] = run_layers([self._new], self._on_device(streams[batch])).cpu()
        return self._mean_loss(streams, chosen, outer["final_norm"], outer.get("output", outer["embedding"]))

    def dense_loss(self, *, held_out: bool = False) -> float:
        """:meth:`loss` of the dense model, whose stream is at its end after :meth:`run`."""
        chosen, config = self._chosen(held_out), self._tensors.config
        head = TensorId("embedding" if config.tie_embeddings else "output")
        matrix = self._tensors.read_block(head, range(config.vocab_size), range(config.hidden_size)).float()
        norm = self._tensors.read_block(TensorId("final_norm"), range(config.hidden_size)).float()
        return self._mean_loss(self._samples.stream[chosen], chosen, norm, matrix)

    def _chosen(self, held_out: bool) -> Tensor:
        """This process's samples, all or those held out, int64."""
        numbers = self._samples.numbers
        if not held_out:
            return torch.arange(len(numbers))
        return torch.isin(numbers, fitted_and_held_out(len(self._folds))[1]).nonzero().flatten()

    def _mean_loss(self, streams: Tensor, chosen: Tensor, norm: Tensor, head: Tensor) -> float:
        """From the streams of ``chosen`` samples after the last layer."""
        norm, head, epsilon = self._on_device(norm), self._on_device(head), self._tensors.config.norm_epsilon
        sums = torch.zeros(2, dtype=torch.float64, device=self._stage.device)
        for stream, number in zip(streams, chosen):
            unit = torch.nn.functional.rms_norm(self._on_device(stream).float(), norm.shape, norm, epsilon)
            tokens = self._on_device(self._samples.tokens[number])
            losses = torch.nn.functional.cross_entropy(unit[:-1] @ head.T, tokens[1:], reduction="none")
            counted = self._on_device(self._samples.weights[number])[1:]
            sums += torch.stack([(losses * counted).sum(), counted.sum()]).double()
        total, count = self._stage.sum_copies(sums).tolist()
        return self._stage.agreed(total / count)

    def _fit_window(self, window: range) -> None:
        """Fit new layers one after the other, then all together if a block of layers was cut among them; file them."""
        fit = not self._world.all_gather(all(self._store.path(number).exists() for number in window))[0]
        ends = [*self._kept[1:], self._tensors.config.num_layers]
        joint = fit and self._fit.passes and self._folds_layers(window)
        self._begin()
        entered = self._pruned.clone() if joint else None
        found = []
        for number, self._new in zip(window, self._open):
            layer, end = self._kept[number], ends[number]
            found.append(self._initial(number) if fit else self._store.load(number))
            self._new.load(reader(found[-1]))
            self._dense.load(layer_reader(self._tensors, layer))
            self._attention(found[-1], number, fit=fit)
            self._mlp(found[-1], number, end, fit=fit)
            found[-1] = {role: weight.float() for role, weight in found[-1].items()}
            check_finite(self._pruned, f"re-fitted layer {layer}", self._world)
        if joint:
            self._reconstruct_window(found, entered)
        if not fit:
            self._progress(self._joint_work(window))
        else:
            self._world.on_main(lambda: [self._store.save(number, weights) for number, weights in zip(window, found)])

    def _folds_layers(self, window: range) -> bool:
        """Whether a block of layers was cut among those of a window, or after them."""
        last = window.stop
        end = self._kept[last] if last < len(self._kept) else self._tensors.config.num_layers
        return end - self._kept[window.start] > len(window)

    def _joint_work(self, window: range) -> int:
        """Tokens × blocks × passes of a window's joint fits."""
        alone = len(window) * (self._narrows_attention() + self._narrows_mlp())
        together = 2 * len(window) * WINDOW_PASSES if self._folds_layers(window) else 0
        return self._samples.tokens.numel() * self._fit.passes * (alone + together)

    def _units(self, role: str, number: int) -> Tensor:
        """Kept units of a tensor of new layer ``number``, the stream uncut, float64."""
        tensor = TensorId(role, number)
        origin = self._cut.origin(tensor)
        full = self._tensors.read_block(origin, *map(range, self._tensors.shape(origin)))
        return self._cut.units(tensor, full, Scratch()).double()

    def _initial(self, number: int) -> dict[str, Tensor]:
        """The cut layer before fitting, in the new basis: float64 full role tensors."""
        weights = {role: self._units(role, number) for role in layer_roles(self._store.config)}
        if self._basis.encode is not None:
            for role in ("o", "down"):
                weights[role] = self._basis.encode.T @ weights[role]
            for norm, roles in READERS.items():
                reading = self._basis.reading(weights[norm])
                weights |= {role: weights[role] @ reading for role in roles}
                weights[norm] = self._basis.norm(weights[norm])
        return weights

    def _attention(self, weights: dict[str, Tensor], number: int, *, fit: bool) -> None:
        dense, new, samples = self._dense, self._new, self._samples
        block = lambda stream: new.write_attention(new.context(new.norm_attention(stream)))
        fit = fit and (self._fit.sequential or self._narrows_attention())
        self._begin()
        if fit:
            self._fit_readers(weights, number, "input_norm", dense.norm_attention, new.norm_attention)
        contexts = []
        for batch in samples.batches():
            before = self._on_device(samples.stream[batch])
            if fit:
                contexts.append(new.context(new.norm_attention(self._on_device(self._pruned[batch]))).cpu())
            samples.stream[batch] = (before + dense.write_attention(dense.context(dense.norm_attention(before)))).cpu()
        if fit:
            self._fit_writer(weights, "o", contexts)
            if self._narrows_attention():
                self._reconstruct(weights, {"q", "k", "v", "o"}, block)
        self._write(block)

    def _mlp(self, weights: dict[str, Tensor], number: int, end: int, *, fit: bool) -> None:
        dense, new, samples = self._dense, self._new, self._samples
        block = lambda stream: new.write_mlp(new.channels(new.norm_mlp(stream)))
        fit = fit and (self._fit.sequential or self._narrows_mlp() or end > self._kept[number] + 1)
        self._begin()
        if fit:
            self._fit_readers(weights, number, "post_norm", dense.norm_mlp, new.norm_mlp)
        channels = []
        for batch in samples.batches():
            middle = self._on_device(samples.stream[batch])
            if fit:
                channels.append(new.channels(new.norm_mlp(self._on_device(self._pruned[batch]))).cpu())
            samples.stream[batch] = (middle + dense.write_mlp(dense.channels(dense.norm_mlp(middle)))).cpu()
            self._progress(samples.weights[batch].numel())
        for layer in range(self._kept[number] + 1, end):
            self._advance(layer)
        if fit:
            self._fit_writer(weights, "down", channels)
            if self._narrows_mlp():
                self._reconstruct(weights, {"gate", "up", "down"}, block)
        self._write(block)

    def _advance(self, layer: int) -> None:
        """Take the dense stream through a layer that goes."""
        dense, samples = self._dense, self._samples
        dense.load(layer_reader(self._tensors, layer))
        for batch in samples.batches():
            samples.stream[batch] = run_layers([dense], self._on_device(samples.stream[batch])).cpu()
            self._progress(samples.weights[batch].numel())
        check_finite(samples.stream, f"layer {layer}", self._world)

    def _begin(self) -> None:
        """Before a block: without ``sequential`` the pruned stream is the dense one."""
        if not self._fit.sequential:
            self._pruned = self._basis.encoded(self._samples.stream).clone()

    def _write(self, block: Callable[[Tensor], Tensor]) -> None:
        """After a block: what the pruned one adds (without ``sequential`` nobody looks at it)."""
        if self._fit.sequential:
            for batch in self._samples.batches():
                self._pruned[batch] += block(self._on_device(self._pruned[batch])).cpu()

    def _fit_readers(
        self,
        weights: dict[str, Tensor],
        number: int,
        norm: str,
        dense_norm: Callable[[Tensor], Tensor],
        new_norm: Callable[[Tensor], Tensor],
    ) -> None:
        """One map from the pruned norm's output to the dense one's, then through the dense matrices."""
        if self._basis.encode is None:
            return
        folds = self._moment_of_norms(dense_norm, new_norm)
        reading = self._basis.reading(self._units(norm, number))
        through = self._solved(reading, lambda: self._through(folds, reading))
        weights |= {role: self._units(role, number) @ through for role in READERS[norm]}
        self._new.load(reader(weights), set(READERS[norm]))

    def _moment_of_norms(self, dense_norm: Callable[[Tensor], Tensor], new_norm: Callable[[Tensor], Tensor]) -> Folds | None:
        """Second moment of the pruned norm's output, [width, width], and of the dense one's with it; on the first process."""
        samples, width = self._samples, self._store.config.hidden_size
        sums = _FoldMoments(self, width, samples.stream.shape[-1])
        for batch in samples.batches():
            seen = new_norm(self._on_device(self._pruned[batch]))
            sums.add(batch, seen, dense_norm(self._on_device(samples.stream[batch])), samples.weights[batch])
        return sums.finish()

    def _fit_writer(self, weights: dict[str, Tensor], role: str, inputs: list[Tensor]) -> None:
        """Fit ``o`` or ``down`` from its input to where the dense stream is now."""
        samples, width = self._samples, self._store.config.hidden_size
        sums = _FoldMoments(self, weights[role].shape[1], width)
        for batch, value in zip(samples.batches(), inputs):
            stream = samples.stream[batch]
            wanted = self._basis.encoded(self._on_device(stream)) - self._on_device(self._pruned[batch])
            sums.add(batch, self._stage.gather(self._on_device(value)), wanted, self._even(batch))
        folds = sums.finish()
        weights[role] = self._solved(weights[role], lambda: fitted(folds, weights[role], self._fit.writers)[0])
        self._new.load(reader(weights), {role})

    def _narrows_attention(self) -> bool:
        old, new = self._tensors.config, self._store.config
        sizes = lambda config: (config.num_attention_heads, config.num_query_groups, config.hidden_size)
        return sizes(old) != sizes(new)

    def _narrows_mlp(self) -> bool:
        old, new = self._tensors.config, self._store.config
        return (old.ffn_hidden_size, old.hidden_size) != (new.ffn_hidden_size, new.hidden_size)

    def _reconstruct(self, weights: dict[str, Tensor], roles: set[str], block: Callable[[Tensor], Tensor]) -> None:
        """Fit all of ``roles`` in the layer at hand together to where the dense stream is now."""
        self._together([(self._new, weights)], roles, block, self._pruned, self._fit.passes, blocks=1)

    def _reconstruct_window(self, found: list[dict[str, Tensor]], entered: Tensor) -> None:
        """Fit all matrices of the open layers together to where the dense stream is now.

        Args:
            found: the layers' role tensors.
            entered: the pruned stream before the first of them.
        """
        layers = self._open[: len(found)]

        def added(stream: Tensor) -> Tensor:
            return run_layers(layers, stream) - stream

        roles, passes = {"q", "k", "v", "o", "gate", "up", "down"}, WINDOW_PASSES * self._fit.passes
        self._together(list(zip(layers, found)), roles, added, entered, passes, blocks=2 * len(layers))
        if self._fit.sequential:
            for batch in self._samples.batches():
                self._pruned[batch] = run_layers(layers, self._on_device(entered[batch])).cpu()

    def _together(
        self,
        layers: list[tuple[OpenLayer, dict[str, Tensor]]],
        roles: set[str],
        added: Callable[[Tensor], Tensor],
        entered: Tensor,
        passes: int,
        *,
        blocks: int,
    ) -> None:
        """Fit the matrices of ``layers``, and their role tensors, so that ``added`` leads from ``entered`` to the dense stream."""
        if not passes:
            return
        samples = self._samples

        def at(batch: Tensor) -> tuple[Tensor, Tensor, Tensor]:
            stream, before = self._on_device(samples.stream[batch]), self._on_device(entered[batch])
            return before, self._basis.encoded(stream) - before, self._even(batch)

        count, length = len(self._folds), samples.stream.shape[1]
        examples = Examples(numbers=samples.numbers, count=count, length=length, at=at)
        size = lambda weights, roles: torch.cat([weights[role].flatten() for role in roles]).square().mean().sqrt().item()
        parts = {role: group for group in (("q", "k", "v"), ("o",), ("gate", "up"), ("down",)) for role in group}
        parameters = [
            (parameter, size(weights, parts[fused[0]]))
            for layer, weights in layers
            for fused, parameter in layer.matrices(roles).items()
        ]
        progress = lambda passes: self._progress(passes * blocks * samples.tokens.numel())
        if reconstruct(parameters, added, examples, self._stage, passes, progress):
            for layer, weights in layers:
                weights |= layer.full(roles)

    def _even(self, batch: slice | Tensor) -> Tensor:
        """Weights of tokens that make them count alike, whatever the size of the dense stream."""
        samples = self._samples
        return self._on_device(samples.weights[batch] / samples.stream[batch].float().square().mean(dim=-1))

    def _final_moments(self) -> Folds | None:
        """Second moments of the final norms' outputs, as :meth:`_moment_of_norms`; the new norm's weight is 1."""
        self._begin()
        config = self._tensors.config
        weight = self._tensors.read_block(TensorId("final_norm"), range(config.hidden_size)).to(self._samples.stream)
        norm = lambda stream: torch.nn.functional.rms_norm(stream, stream.shape[-1:], eps=config.norm_epsilon)
        return self._moment_of_norms(lambda stream: norm(stream) * self._on_device(weight), norm)

    def _outer(self, folds: Folds) -> dict[str, Tensor]:
        """Embedding, final norm and head in the new basis, float32."""
        config, basis = self._tensors.config, self._basis
        shape = (range(config.vocab_size), range(config.hidden_size))
        whole = lambda role: self._tensors.read_block(self._cut.origin(TensorId(role)), *shape).float()
        norm = self._tensors.read_block(TensorId("final_norm"), range(config.hidden_size)).double()
        found = {"embedding": basis.encoded(whole("embedding")), "final_norm": norm.float()}
        if basis.encode is None:
            return found | ({} if self._store.config.tie_embeddings else {"output": whole("output")})
        if self._store.config.tie_embeddings:
            weight = basis.tied_norm(norm)
            return found | {"final_norm": (scale(folds, basis.encode * weight) * weight).float()}
        reading = basis.reading(norm)
        ones = torch.ones(self._store.config.hidden_size)
        return found | {"final_norm": ones, "output": whole("output") @ self._through(folds, reading).float()}

    def _through(self, folds: Folds, reading: Tensor) -> Tensor:
        """The map from a pruned norm's output to the dense one's that ``reading`` is a start for, float64."""
        return fitted(folds, scale(folds, reading) * reading, self._fit.readers)[0]

    def _solved(self, like: Tensor, solve: Callable[[], Tensor]) -> Tensor:
        """What the first process solves, the same on every one: float64 in the shape of ``like``."""
        found = solve() if self._world.is_main else torch.empty(like.shape, dtype=torch.float64)
        return self._stage.spread(found.contiguous())

    def _on_device(self, value: Tensor) -> Tensor:
        return value.to(self._stage.device)


def folds_of(calibration: Calibration) -> Tensor:
    """Which of two folds each sample is in, int64 [samples]: every other one, so that both have the same mixture."""
    return torch.arange(len(calibration.tokens)) % 2


def windows_of(kept: list[int], layers: int) -> list[range]:
    """New layers that are fitted together: one each, or the one before a cut block of layers and ``AFTER`` that follow.

    Args:
        kept: layers that stay, ascending.
        layers: of the dense model.
    """
    ends, windows = [*kept[1:], layers], []
    while not windows or windows[-1].stop < len(kept):
        start = windows[-1].stop if windows else 0
        length = 1 if ends[start] == kept[start] + 1 else 1 + AFTER
        windows.append(range(start, min(start + length, len(kept))))
    return windows


def run_layers(layers: list[OpenLayer], stream: Tensor) -> Tensor:
    """The stream after all of ``layers``."""
    for layer in layers:
        stream = stream + layer.write_attention(layer.context(layer.norm_attention(stream)))
        stream = stream + layer.write_mlp(layer.channels(layer.norm_mlp(stream)))
    return stream


class _FoldMoments:
    """Second moments of x and of (t, x), for every fold of the samples."""

    def __init__(self, run: Refit, features: int, targets: int):
        self._run, self._features = run, features
        self._folds = run._folds[run._samples.numbers]
        self._sums = [Moment(run._stage, features, targets) for _ in range(int(run._folds.max()) + 1)]

    def add(self, batch: slice, value: Tensor, wanted: Tensor, weight: Tensor) -> None:
        weight = self._run._on_device(weight)
        for fold, sums in enumerate(self._sums):
            mine = (self._folds[batch] == fold).to(value.device)
            if mine.all():
                sums.add(value, weight, wanted)
            elif mine.any():
                sums.add(value[mine], weight[mine], wanted[mine])

    def finish(self) -> Folds | None:
        whole = [sums.whole() for sums in self._sums]
        if whole[0] is None:
            return None
        return [(part[:, : self._features], part[:, self._features :].T) for part in whole]
