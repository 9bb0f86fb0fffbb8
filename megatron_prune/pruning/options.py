"""What pruning a model of either kind asks."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from megatron_prune.config import option
from megatron_prune.importance.artifact import ScoresManifest
from megatron_prune.importance.metric import metric_named
from megatron_prune.pruning.fit import FitOptions
from megatron_prune.pruning.target_options import TargetOptions, metrics_of, vocab_alone
from megatron_prune.serving.options import ServeOptions
from megatron_prune.writing.check import CheckOptions


@dataclass(frozen=True, kw_only=True)
class PruningOptions(TargetOptions, ServeOptions, FitOptions, CheckOptions):
    """What stays, how it is re-fitted, and what is written beside it."""

    scores: str | None = option("use these scores (of megatron-prune score) and their text", None)
    save_plan: str | None = option("also write the plan here", None)
    overwrite: bool = option("replace an existing output directory", False)
    strict: bool = option("refuse weights that hold NaN or infinity instead of warning", False)

    def wants_text(self) -> bool:
        """Whether anything is measured: text or scores were named, re-fitting asked for, or a metric needs it."""
        named = self.data is not None or self.scores is not None or bool(self.refit)
        if (self.plan and not self.uniform) or vocab_alone(self):
            return named
        return named or any(metric_named(name).needs for name in metrics_of(self, has_text=False).values())

    def kept_metrics(self) -> list[str] | None:
        """Metrics of the scores that were named.

        Raises:
            InputError: if the directory holds no finished scores.
        """
        return ScoresManifest.load(Path(self.scores)).metrics if self.scores else None
