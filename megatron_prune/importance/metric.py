"""What a metric is: a function of the weights and of what a pass over text left behind, unit by unit.

A metric never communicates and knows nothing of ranks: weights come to it as blocks of whole role tensors or of whole units,
statistics as full sums. The runner (``importance/scoring.py``) adds up over tensors and ranks.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any, Callable, ClassVar, NamedTuple

from torch import Tensor

from megatron_prune.arch.tensors import TensorId
from megatron_prune.axes.axis import AXES
from megatron_prune.errors import InputError
from megatron_prune.importance.parameters import read, split, written
from megatron_prune.importance.statistics import CROSS_ENTROPY, Statistics
from megatron_prune.planning.selection import Scores
from megatron_prune.registry import Registry


class Metrics(Registry[type["Metric"]]):
    """The registry of metrics: a class knows the name under which it is registered."""

    def register(self, name: str) -> Callable[[type[Metric]], type[Metric]]:
        add = super().register(name)

        def named(kind: type[Metric]) -> type[Metric]:
            spread = [axis for axis in sorted(kind.axes) if not AXES.get(axis).sharded]
            if kind.reads_units and spread:
                raise TypeError(f"metric {name}: units of {', '.join(spread)} are on all ranks: none sees a whole one")
            asked = getattr(kind, "sums", frozenset())
            if SAMPLE in asked and not (kind.reads_units and asked == {SAMPLE}):
                raise TypeError(f"metric {name}: {SAMPLE!r} is asked for alone, and of whole units")
            kind.name = name
            return add(kind)

        return named


GATES, SAMPLE = "gates", "sample"
"""Sums of a :class:`GradientMetric` that are not of every weight over all samples."""

METRICS = Metrics("metric", "megatron_prune.importance.metrics")


class Part(NamedTuple):
    """What units of a block own of one of its tensors: rows of one that reads the stream, columns of the one that writes to it.

    ``weight`` is float32 [units, elements of the unit, hidden], of a bias [units, elements]; ``sums`` are those of its gradient
    that the metric asks for (:attr:`GradientMetric.sums`), each of the same shape.
    """

    weight: Tensor
    sums: dict[str, Tensor] = {}


class Metric(ABC):
    """Scores units in two moves: a sum that ranks and tensors add to, and a function of the finished sum.

    Attributes:
        name: under which it is registered.
        Parameters: a frozen dataclass of :func:`megatron_prune.config.option` fields, all with defaults, that can be written
            after its name (``obs:damping=0.1``).
        needs: what must have been collected: ``"activations"`` (a forward pass), ``"gradients"`` (forward and backward
            passes of the whole model) or ``"losses"`` (a forward pass for every layer taken out).
        moments: axis → the site (``statistics.SITES``) whose second moments, or the tokens, it reads to score that axis.
        axes: the axes it can score.
        reads_weights: whether :meth:`per_weight` is called at all.
        reads_units: whether :meth:`per_unit` is called at all; its axes are then among those of blocks (``ffn``, ``head``,
            ``kv_head``): no rank holds the whole of another axis's unit.
        block_wise: whether it judges consecutive layers as a whole (:meth:`block_scores`).
        signed: whether a score can be below zero.

    Args:
        seed: for metrics that draw.
        statistics: what was collected; ``None`` where nothing is needed.
        parameters: of :attr:`Parameters`, those that are not left at their defaults.
    """

    @dataclass(frozen=True, kw_only=True)
    class Parameters:
        """None."""

    name: ClassVar[str]
    needs: ClassVar[frozenset[str]] = frozenset()
    moments: ClassVar[dict[str, str]] = {}
    axes: ClassVar[frozenset[str]] = frozenset({"hidden", "ffn", "head", "kv_head", "layer"})
    reads_weights: ClassVar[bool] = False
    reads_units: ClassVar[bool] = False
    block_wise: ClassVar[bool] = False
    signed: ClassVar[bool] = False

    def __init__(self, *, seed: int = 0, statistics: Statistics | None = None, **parameters: Any):
        self.seed, self.statistics, self.parameters = seed, statistics, self.Parameters(**parameters)

    @property
    def spelling(self) -> str:
        """Its name, with the parameters that are not at their defaults: what plans and scores on disk name it by."""
        return written(self.name, self.parameters)

    def per_weight(self, axis: str, tensor: TensorId, weight: Tensor, cols: range) -> Tensor:
        """What every weight of a block contributes to the unit of ``axis`` that owns it.

        Args:
            tensor: the role tensor the block is from.
            weight: whole rows of units, [rows] or [rows, cols].
            cols: which columns of the role tensor these are.

        Returns:
            The same shape as ``weight``, floating point.
        """
        raise NotImplementedError

    def per_unit(self, axis: str, layer: int, parts: dict[str, Part], samples: float) -> Tensor:
        """What units contribute to their own sums, from all that each of them owns; every unit by itself.

        Args:
            parts: role → its part in the units (of the block that ``axis`` cuts; norms are no unit's).
            samples: over how many samples the sums of gradients run; 0 of a metric that asks for none.

        Returns:
            Floating point [units].
        """
        raise NotImplementedError

    @abstractmethod
    def finish(self, axis: str, layer: int | None, total: Tensor) -> Tensor:
        """Scores from finished sums.

        Args:
            total: float64 [units], full (zeros if :attr:`reads_weights` and :attr:`reads_units` are false).

        Returns:
            float64 [units]; larger is more important.
        """

    def conclude(self, scores: Scores) -> Scores:
        """The last word over all scores of an axis, where they are to be standardised, or ranked, over all layers.

        It sees finite numbers alone: a unit of broken weights has the lowest score that was found, and goes first whatever is
        said here.

        Args:
            scores: of every place of one axis, whichever are wanted; the same on every process.

        Returns:
            As many scores of the same places.
        """
        return scores

    def block_scores(self, count: int) -> Tensor:
        """Importance of every ``count`` consecutive layers as a whole, float64 [layers - count + 1] by first layer."""
        raise NotImplementedError


class GradientMetric(Metric):
    """A metric of gradients, summed while the backward passes run (``importance/gradients.py``).

    :meth:`per_gradient` is called, or, where it :attr:`reads_units`, :meth:`per_unit`.

    Attributes:
        sums: which sums over samples it asks for. Of the gradient g of a sample's objective (cross-entropy: the mean over its
            tokens), for every weight: ``"total"`` (Σ g), ``"squares"`` (Σ g²), ``"magnitudes"`` (Σ \\|g\\|). Alone, and of whole
            units: ``"sample"``, g itself, sample by sample; what :meth:`per_unit` says of each is summed by their weights. For
            every channel and head instead of weights: ``"gates"``, which are scores by themselves (``metrics/fisher.py``).
        objectives: the functionals (``importance/objectives``) whose gradients it weighs with; each is summed by itself.
    """

    needs = frozenset({"gradients"})
    sums: ClassVar[frozenset[str]]
    objectives: ClassVar[tuple[str, ...]] = (CROSS_ENTROPY,)

    def per_gradient(self, weight: Tensor, sums: dict[str, Tensor], samples: float) -> Tensor:
        """What every weight contributes to the unit that owns it; not called for ``"gates"``.

        Args:
            weight: float32, any shape.
            sums: :attr:`sums`, float32, of the same shape, over all samples.
            samples: their number (sum of their weights).
        """
        raise NotImplementedError

    def gradient_sums(self, axis: str, layer: int | None, objective: str) -> Tensor:
        """What its units came to with the gradients of an objective, float64 [units]."""
        return self.statistics.gradient(self.spelling, axis, layer, objective)

    def finish(self, axis: str, layer: int | None, total: Tensor) -> Tensor:
        return self.gradient_sums(axis, layer, self.objectives[0])


def metric_named(spelling: str, *, seed: int = 0, statistics: Statistics | None = None) -> Metric:
    """The metric that is written as ``spelling``: a name, and parameters if wanted (``obs:damping=0.1``).

    Raises:
        InputError: if there is no such metric, or it has no such parameter, or none of such a value, or its ``__init__`` fails.
    """
    name, words = split(spelling)
    kind = METRICS.get(name)
    parameters = vars(read(kind.Parameters, words, f"metric {name}"))
    try:
        return kind(seed=seed, statistics=statistics, **parameters)
    except InputError:
        raise
    except Exception as error:  # of whoever wrote it
        raise InputError(f"metric {name} cannot be made: its __init__ fails", got=f"{type(error).__name__}: {error}") from error
