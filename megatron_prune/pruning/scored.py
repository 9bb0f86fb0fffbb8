"""What units are scored by: scores that were kept, or what was measured on text, and the weights."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from megatron_prune.arch.tensors import tensor_ids
from megatron_prune.axes.axis import AXES, layer_axes
from megatron_prune.errors import InputError
from megatron_prune.importance.artifact import ScoresManifest, load_scores
from megatron_prune.importance.metric import metric_named
from megatron_prune.importance.scoring import score
from megatron_prune.importance.statistics import Statistics
from megatron_prune.planning.selection import Scores
from megatron_prune.pruning.measure import Subject
from megatron_prune.pruning.options import ChoosingOptions
from megatron_prune.pruning.request import Request
from megatron_prune.runtime.reporting import progress_bar


@dataclass(frozen=True, kw_only=True, eq=False)
class Scored:
    """A model whose units can be scored.

    Attributes:
        seed: of the random metric.
        kept: directory of scores of metrics that measure, made before; ``None``: they are made of the statistics.
        statistics: of the text; ``None`` where nothing was measured.
    """

    subject: Subject
    seed: int
    kept: Path | None = None
    statistics: Statistics | None = None

    def scores(self, name: str, wanted: list[tuple[str, int | None]], dropped: list[int]) -> Scores:
        """A metric's scores of (axis, layer) pairs, full; every process takes part.

        Args:
            dropped: numbers of layers that may go as one block: a metric that judges blocks scores these too.
        """
        metric, subject = metric_named(name, seed=self.seed, statistics=self.statistics), self.subject
        if self.kept is not None and metric.needs:
            return load_scores(self.kept, name)
        total = sum(subject.tensors.nbytes(tensor) for tensor in tensor_ids(subject.config))
        shown = subject.world.is_main and metric.reads_weights
        with progress_bar("scoring", total // (subject.layout.tensor * subject.layout.pipeline), shown=shown) as advance:
            scores = score(metric, subject.tensors, subject.layout, wanted, subject.world, advance)
        return scores | {("block", count): metric.block_scores(count) for count in (dropped if metric.block_wise else ())}

    def by_layer(self, metric_of: dict[str, str]) -> Scores:
        """The scores of all units that are chosen layer by layer, of every layer.

        Args:
            metric_of: axis → name of the metric that scores it.
        """
        found: Scores = {}
        for axis in layer_axes():
            wanted = [(axis, layer) for layer in AXES.get(axis).places(self.subject.config)]
            scores = self.scores(metric_of[axis], wanted, [])
            found |= {place: scores[place] for place in wanted}
        return found


def check_scores(kept: Path, request: Request, subject: Subject) -> None:
    """Refuse scores of another model, or without a metric that is needed.

    Raises:
        InputError: saying which.
    """
    manifest = ScoresManifest.load(kept)
    manifest.check(subject.config, subject.model.identity, kept)
    for name in request.metrics(subject.config):
        if metric_named(name).needs and name not in manifest.metrics:
            raise InputError(
                f"{kept} holds no scores of {name}", got=", ".join(manifest.metrics), do=f"score with --metrics {name}"
            )


def kept_metrics(options: ChoosingOptions) -> list[str] | None:
    """Metrics of the scores that were named.

    Raises:
        InputError: if the directory holds no finished scores.
    """
    return ScoresManifest.load(Path(options.scores)).metrics if options.scores else None
