"""Re-fitting: what stays learns, by least squares, to do what the whole did, then by a few gradient steps on each block's
own output. Layer by layer, stock output.

Two streams of the same tokens go through the model side by side, the dense one S and the pruned one Z (in the basis of the
pruned model). Every block that stays is fitted (``block_fit.py``) to bring Z to where S is at the input of the next block *that
stays*: what is cut between them, a block or whole layers, is folded into the matrix before it.

After its last matrix, all matrices of a block that was cut are fitted together to the same (``reconstruct.py``). What one matrix
can not carry of layers that were cut is left to the layers on either side: the layer before them and the few that follow, a
window, are fitted together in the same way to the dense stream after the last of them (as CBQ, Ding et al. 2023, arXiv
2312.07950, does across blocks that are quantised). Layers *before* the fold stay out of it: they lower the error too, but unsettle
tokens of massive activation (``docs/quality.md``).

Z is set to the dense stream before every block, so that each is fitted to the dense model's own statistics, and blocks that
are whole, fold nothing and are in no window stay as they are. With ``sequential`` Z is what the layers before really left, and every block is fitted
to mend what they could not: more fitting, which follows the text at hand more closely than the model, but keeps errors from piling
up where a cut is severe (measured in ``docs/quality.md``).
Moments are accumulated under TP × DP (``importance/moments.py``) and solved by the first process; only the layer at hand, or those
of a window, are in memory.
"""

from __future__ import annotations

from typing import Callable

import torch
from torch import Tensor

from megatron_prune.arch.blocks.block import BlockKind
from megatron_prune.arch.tensors import EMBEDDING, FINAL_NORM, HEAD, TensorId, layer_roles
from megatron_prune.axes.axis import AXES
from megatron_prune.checkpoint.role_store import RoleStore
from megatron_prune.checkpoint.tensor_map import TensorMap
from megatron_prune.files.region import Scratch
from megatron_prune.importance.text_loss import mean_loss
from megatron_prune.importance.walk import Walk, check_finite
from megatron_prune.planning.amounts import WINDOW_PASSES
from megatron_prune.planning.plan import Plan
from megatron_prune.runtime.ends import final_norm_factors, norm
from megatron_prune.runtime.stage import Layers, OpenBlock, OpenLayer, Stage, added, reader, through
from megatron_prune.runtime.world import World
from megatron_prune.surgery.basis import Basis
from megatron_prune.surgery.block_fit import BlockFit, Fit, Folds
from megatron_prune.surgery.cut import Cut, embedding_gain
from megatron_prune.surgery.kept import DenseWalk, KeptBlock, kept_blocks, windows_of
from megatron_prune.surgery.least_squares import scale
from megatron_prune.surgery.reconstruct import Examples, fitted_and_held_out, reconstruct
from megatron_prune.text.tokens import Calibration

Sizes = dict[tuple[str, ...], float]
"""Roles of a fused matrix → its root mean square."""


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
        self._old, self._config, self._world, self._fit = tensors.config, store.config, world, fit
        self._cut, self._calibration, self._dtype = Cut(plan, tensors.config), calibration, dtype
        self._kept = [entry.layer for entry in plan.layers]
        self._walk = DenseWalk(tensors, calibration, stage, world, dtype=dtype)
        self._blocks = kept_blocks(self._walk.places, self._kept, store.config)
        self._pruned = self._walk.stream.new_empty(*self._walk.stream.shape[:2], store.config.hidden_size)
        self._encode()
        self._block_fit = BlockFit(self._walk, self._old, self._config, basis, fit)
        self._windows = windows_of(self._kept, self._old.num_layers)
        self._layers = Layers(stage, store.config, max(map(len, self._windows)))

    def work(self) -> int:
        """What :meth:`run` reports in all: tokens × layers of the dense model, and tokens × blocks × passes of joint fits."""
        layers, each = {layer for layer, _ in self._walk.places}, map(self._joint_work, self._windows)
        return self._walk.tokens.numel() * len(layers) + sum(each)

    def run(self, progress: Callable[[int], None] = lambda work: None) -> None:
        """Fit every layer that stays, then what is outside the layers; every process takes part.

        Args:
            progress: called with the share of :meth:`work` done since.

        Raises:
            InputError: naming a layer whose output is not finite.
        """
        self._progress = self._walk.progress = progress
        self._walk.advance(self._blocks[0].start if self._blocks else len(self._walk.places))
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
        tensors, among = self._store.tensors(), self._among(held_out)
        walk = Walk(tensors, self._calibration, self._stage, self._world, dtype=self._dtype, among=among)
        walk.to_the_end()
        return mean_loss(walk, tensors, among)

    def dense_loss(self, *, held_out: bool = False) -> float:
        """:meth:`loss` of the dense model, whose stream is at its end after :meth:`run`."""
        return mean_loss(self._walk, self._tensors, self._among(held_out))

    def _among(self, held_out: bool) -> Tensor | None:
        return fitted_and_held_out(self._walk.count)[1] if held_out else None

    # ------------------------------------------------------------------------------------------------ windows

    def _fit_window(self, window: range) -> None:
        """Fit new layers one after the other, then all together if layers were cut among them; file them.

        The first process alone keeps the role tensors of layers that are done; all hold their shards of the window.
        """
        fit = not self._world.all_gather(all(self._store.path(number).exists() for number in window))[0]
        joint = fit and self._fit.passes and self._folds_layers(window)
        self._begin()
        entered = self._pruned.clone() if joint else None
        found, opened, sizes = [], [], []
        for place, number in enumerate(window):
            opened.append(self._layers.at(number, place))
            found.append(self._initial(number) if fit else self._store.load(number))
            opened[-1].load(reader(found[-1]))
            for kept, block in zip((kept for kept in self._blocks if kept.number == number), opened[-1].blocks):
                self._fit_block(kept, block, opened[-1], found[-1], fit=fit, window=window)
            weights = {role: weight.float() for role, weight in found.pop().items()}
            sizes.append(_root_mean_squares(opened[-1], weights, set(self._config.of_layer(number).kinds)) if joint else {})
            found.append(weights if self._world.is_main else {})
            check_finite(self._pruned, f"re-fitted layer {self._kept[number]}", self._world)
        if joint:
            self._reconstruct_window(opened, sizes, found, entered)
        if not fit:
            self._progress(self._joint_work(window))
        else:
            self._world.on_main(lambda: [self._store.save(number, weights) for number, weights in zip(window, found)])

    def _folds_layers(self, window: range) -> bool:
        """Whether layers were cut among those of a window, or after them."""
        last = window.stop
        end = self._kept[last] if last < len(self._kept) else self._old.num_layers
        return end - self._kept[window.start] > len(window)

    def _joint_work(self, window: range) -> int:
        """Tokens × blocks × passes of a window's joint fits."""
        blocks = [kept for kept in self._blocks if kept.number in window]
        alone = sum(self._fits_jointly(kept, window) for kept in blocks)
        together = len(blocks) * WINDOW_PASSES if self._folds_layers(window) else 0
        return self._walk.tokens.numel() * self._fit.passes * (alone + together)

    def _reconstruct_window(
        self, layers: list[OpenLayer], sizes: list[Sizes], found: list[dict[str, Tensor]], entered: Tensor
    ) -> None:
        """Fit all matrices of the window's layers together to where the dense stream is now.

        Args:
            found: the layers' role tensors on the first process.
            entered: the pruned stream before the first of them.
        """
        kinds = [block.kind for layer in layers for block in layer.blocks]
        forward = lambda stream: through(layers, stream) - stream
        passes = WINDOW_PASSES * self._fit.passes
        if self._together(list(zip(layers, sizes)), forward, entered, passes, blocks=len(kinds)):
            for layer, weights in zip(layers, found):
                fitted = layer.full(_matrices(layer, set(kinds)))
                if weights:
                    weights |= fitted
        if self._fit.sequential:
            for batch in self._walk.batches():
                self._pruned[batch] = through(layers, self._walk.on_device(entered[batch])).cpu()

    # ------------------------------------------------------------------------------------------------ blocks

    def _begin(self) -> None:
        """Before a block: without ``sequential`` the pruned stream is the dense one."""
        if not self._fit.sequential:
            self._encode()

    def _encode(self) -> None:
        """The dense stream in the basis, a few samples at a time where the stage computes."""
        for batch in self._walk.batches():
            self._pruned[batch] = self._basis.encoded(self._walk.on_device(self._walk.stream[batch])).cpu()

    def _fit_block(
        self, kept: KeptBlock, new: OpenBlock, layer: OpenLayer, weights: dict[str, Tensor], *, fit: bool, window: range
    ) -> None:
        """Fit a block of an open layer, and its role tensors ``weights``; take both streams to the next block that stays."""
        walk, blocks = self._walk, self._block_fit
        fit = fit and (self._fit.sequential or self._narrows(kept) or kept.folds)
        self._begin()
        inside, lengths = [], []
        if fit:
            self._fit_readers(kept, new, layer, weights)
            for batch in walk.batches():
                inside.append(new.inside(new.norm(walk.on_device(self._pruned[batch]))).cpu())
                if self._config.after_norms:
                    lengths.append(_length(walk.block(), walk.on_device(walk.stream[batch])))
        walk.advance(kept.end)
        if fit:
            role = kept.kind.writer
            if self._config.after_norms:
                gain = weights[kept.kind.after_norm] + self._config.norm_offset
                weights[role] = blocks.writer_before_norm(weights[role], inside, lengths, gain, self._pruned)
                layer.load(reader(weights), {role})
                self._fit_length(kept, new, layer, weights, inside)
            else:
                weights[role] = blocks.writer(weights[role], inside, self._pruned)
                layer.load(reader(weights), {role})
            if self._fits_jointly(kept, window):
                forward, sizes = (lambda stream: added(new, stream)), _root_mean_squares(layer, weights, {kept.kind})
                if self._together([(layer, sizes)], forward, self._pruned, self._fit.passes, blocks=1):
                    weights |= layer.full(_matrices(layer, {kept.kind}))
        if self._fit.sequential:  # without it nobody looks at what the pruned block adds
            for batch in walk.batches():
                self._pruned[batch] += added(new, walk.on_device(self._pruned[batch])).cpu()

    def _fit_readers(self, kept: KeptBlock, new: OpenBlock, layer: OpenLayer, weights: dict[str, Tensor]) -> None:
        if self._basis.stream is None:
            return
        whole = {role: self._units(role, kept.number) for role in kept.kind.readers}
        norm = self._units(kept.kind.norm, kept.number)
        weights |= self._block_fit.readers(norm, whole, self._walk.block(), new, self._pruned)
        layer.load(reader(weights), set(kept.kind.readers))

    def _fit_length(
        self, kept: KeptBlock, new: OpenBlock, layer: OpenLayer, weights: dict[str, Tensor], inside: list[Tensor]
    ) -> None:
        """Fit the length of what a norm after a block lets it add."""
        role, offset = kept.kind.after_norm, self._config.norm_offset
        outputs = [new.after(new.write(self._walk.on_device(value))).cpu() for value in inside]
        weights[role] = (weights[role] + offset) * self._block_fit.length(outputs, self._pruned) - offset
        layer.load(reader(weights), {role})

    def _fits_jointly(self, kept: KeptBlock, window: range) -> bool:
        """Whether a block's matrices are fitted together: it was cut, or folds one that the window does not make up for."""
        return self._narrows(kept) or (kept.folds and not self._folds_layers(window))

    def _narrows(self, kept: KeptBlock) -> bool:
        old, new = self._old.of_layer(self._kept[kept.number]), self._config.of_layer(kept.number)
        sizes = lambda config: [AXES.get(axis).count(config) for axis in (*kept.kind.axes, "hidden")]
        return sizes(old) != sizes(new)

    def _units(self, role: str, number: int) -> Tensor:
        """Kept units of a tensor of new layer ``number``, the stream uncut, float64."""
        tensor = TensorId(role, number)
        origin = self._cut.origin(tensor)
        full = self._tensors.read_block(origin, *map(range, self._tensors.shape(origin)))
        return self._cut.units(tensor, full, Scratch()).double()

    def _initial(self, number: int) -> dict[str, Tensor]:
        """The cut layer before fitting, in the new basis: float64 full role tensors."""
        config, basis, offset = self._config.of_layer(number), self._basis, self._config.norm_offset
        weights = {role: self._units(role, number) for role in layer_roles(config)}
        for kind in config.kinds if basis.stream is not None else ():
            weights[kind.writer] = basis.stream.carry(weights[kind.writer], 0, reading=False, scratch=Scratch())
            reading = basis.reading(weights[kind.norm] + offset)
            weights |= {role: weights[role] @ reading for role in kind.readers}
            for role in (kind.norm, kind.after_norm):
                if role in weights:
                    weights[role] = basis.norm(weights[role] + offset) - offset
        return weights

    def _together(
        self,
        layers: list[tuple[OpenLayer, Sizes]],
        forward: Callable[[Tensor], Tensor],
        entered: Tensor,
        passes: int,
        *,
        blocks: int,
    ) -> bool:
        """Fit matrices of ``layers`` in place, so that ``forward`` leads from ``entered`` to the dense stream.

        Returns:
            Whether that changed them.
        """
        if not passes:
            return False
        walk = self._walk

        def at(batch: Tensor) -> tuple[Tensor, Tensor, Tensor]:
            return walk.on_device(entered[batch]), self._block_fit.wanted(batch, entered), walk.even(batch)

        examples = Examples(numbers=walk.numbers, count=walk.count, length=walk.stream.shape[1], at=at)
        parameters = []
        for layer, sizes in layers:
            held = layer.matrices({role for fused in sizes for role in fused})
            parameters += [(parameter, sizes[fused]) for fused, parameter in held.items()]
        progress = lambda passes: self._progress(passes * blocks * walk.tokens.numel())
        return reconstruct(parameters, forward, examples, self._stage, passes, progress)

    # ------------------------------------------------------------------------------------------------ the stream's ends

    def _final_moments(self) -> Folds | None:
        """Second moments of the final norms' outputs (``BlockFit.norm_moments``); the new norm's factors are 1."""
        self._begin()
        factors = self._walk.on_device(final_norm_factors(self._tensors).to(self._walk.stream))
        bare = lambda stream: norm(stream, self._old)
        return self._block_fit.norm_moments(lambda stream: bare(stream) * factors, bare, self._pruned)

    def _outer(self, folds: Folds) -> dict[str, Tensor]:
        """Embedding, final norm and head in the new basis, float32."""
        old, basis, offset = self._old, self._basis, self._old.norm_offset
        shape = (range(old.vocab_size), range(old.hidden_size))
        whole = lambda tensor: self._tensors.read_block(self._cut.origin(tensor), *shape).float()
        stored = self._tensors.read_block(FINAL_NORM, range(old.hidden_size)).double()
        gain, factors = embedding_gain(old, self._config), stored + offset
        embedding, tied = basis.encoded(whole(EMBEDDING)) * gain, self._config.tie_embeddings
        if basis.stream is None:
            new_norm, head = stored.float(), None if tied else whole(HEAD)
        elif tied:
            weight = basis.tied_norm(factors)
            new_norm, head = (scale(folds, basis.encode * weight) * weight / gain - offset).float(), None
        else:
            ones = torch.ones(self._config.hidden_size)
            through = self._block_fit.through(folds, factors[:, None] * basis.decode).cpu()  # the new norm's factors are 1
            new_norm, head = ones - offset, whole(HEAD) @ through.float()
        ends = {EMBEDDING: embedding, FINAL_NORM: new_norm} | ({} if head is None else {HEAD: head})
        return {tensor.role: value for tensor, value in ends.items()}


def _length(block: OpenBlock, stream: Tensor) -> Tensor:
    """Root mean square of a writer's output, float64 [samples, tokens] on the host."""
    return block.write(block.inside(block.norm(stream))).double().square().mean(dim=-1).sqrt().cpu()


def _root_mean_squares(layer: OpenLayer, weights: dict[str, Tensor], kinds: set[BlockKind]) -> Sizes:
    """Of the matrices of some kinds of block, as the stage fuses them."""
    found = {}
    for fused in layer.matrices(_matrices(layer, kinds)):
        group = next(tensor.roles for kind in kinds for tensor in kind.megatron if fused[0] in tensor.roles)
        found[fused] = torch.cat([weights[role].flatten() for role in group]).square().mean().sqrt().item()
    return found


def _matrices(layer: OpenLayer, kinds: set[BlockKind]) -> set[str]:
    return {role for block in layer.blocks if block.kind in kinds for role in block.kind.matrices}
