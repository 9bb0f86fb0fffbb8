"""The course of a recovery: steps, held-out losses, checkpoints, and the end, whatever brings it."""

from __future__ import annotations

import math
import signal
from dataclasses import dataclass, field, replace
from typing import Any, Callable

from torch.utils.data import Dataset

from megatron_prune.checkpoint.manifest import Manifest
from megatron_prune.files.documents import STRICT
from megatron_prune.recovery.checkpoints import Checkpoints
from megatron_prune.recovery.history import History
from megatron_prune.recovery.trainer import Step, Trainer, TrainingError

STEP_NAME = "recover"
"""What the entry in a checkpoint's recipe is called."""


@dataclass(frozen=True, kw_only=True)
class Intervals:
    """When what happens, in iterations.

    Attributes:
        evaluate_for: global batches that a held-out loss is measured on.
        patience: held-out losses in a row that are no better than the best before the run ends early; 0 for never.
    """

    train: int
    log: int
    save: int
    evaluate: int
    evaluate_for: int
    patience: int


@dataclass(frozen=True, kw_only=True)
class Position:
    """Where a run is: all that a checkpoint has to say beside its tensors. Losses in nats per token.

    Attributes:
        start_loss: held-out, before the first step.
        best_loss: the lowest held-out loss so far; with ``best_saved`` the lowest of a checkpoint.
        since_best: held-out losses measured since.
    """

    __pydantic_config__ = STRICT

    iteration: int = 0
    start_loss: float | None = None
    held_out_loss: float | None = None
    best_loss: float | None = None
    best_saved: float | None = None
    since_best: int = 0

    def measured(self, loss: float) -> Position:
        """The position with a new held-out loss."""
        better = self.best_loss is None or loss < self.best_loss
        return replace(
            self,
            held_out_loss=loss,
            best_loss=loss if better else self.best_loss,
            since_best=0 if better else self.since_best + 1,
        )


class StopSignals:
    """SIGTERM and SIGINT ask the run to save and leave; a second SIGINT is not waited for."""

    def __init__(self) -> None:
        self.asked: int | None = None
        self._before = {number: signal.signal(number, self._ask) for number in (signal.SIGTERM, signal.SIGINT)}

    def _ask(self, number: int, frame: Any) -> None:
        if self.asked is not None and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.asked = number

    def restore(self) -> None:
        """Put back what signals did before."""
        for number, handler in self._before.items():
            signal.signal(number, handler)


@dataclass(eq=False)
class Run:
    """A recovery under way.

    Args:
        train, valid: data sets.
        describe: position → the manifest of a checkpoint there.
        history: on the main process; ``None`` elsewhere.
    """

    trainer: Trainer
    train: Dataset
    valid: Dataset
    intervals: Intervals
    checkpoints: Checkpoints
    describe: Callable[[Position, Step], Manifest]
    history: History | None
    position: Position = Position()
    stopped: bool = field(init=False, default=False)
    _recent: list[Step] = field(init=False, default_factory=list)

    def course(self) -> Position:
        """Train to the end; the position there. ``stopped`` tells whether a signal brought it.

        Raises:
            TrainingError: on a loss that is not finite or a checkpoint that cannot be written; those before stay.
        """
        signals = StopSignals()
        try:
            if self.position.start_loss is None:
                loss = self._held_out()
                self.position = replace(self.position.measured(loss), start_loss=loss)
            elif self.position.held_out_loss is None and self._due():  # a stop did not wait for it
                self.position = self.position.measured(self._held_out())
                if self._is_best():
                    self.position = replace(self.position, best_saved=self.position.held_out_loss)
                    self.checkpoints.mark_best(self.position.iteration)
            while self.position.iteration < self.intervals.train and not self._ended():
                self._one(signals)
            self.checkpoints.finish()
        except TrainingError:
            self.checkpoints.finish()
            raise
        finally:
            signals.restore()
        return self.position

    def _due(self) -> bool:
        """Whether the held-out loss is due here."""
        iteration, intervals = self.position.iteration, self.intervals
        return iteration % intervals.evaluate == 0 or iteration % intervals.save == 0 or iteration == intervals.train

    def _ended(self) -> bool:
        patience = self.intervals.patience
        return self.stopped or (patience > 0 and self.position.since_best >= patience)

    def _one(self, signals: StopSignals) -> None:
        iteration = self.position.iteration + 1
        consumed = self.position.iteration * self.trainer.sizes.global_batch
        try:
            step = self.trainer.step(self.train, consumed, stop=signals.asked is not None)
        except TrainingError as error:
            raise TrainingError(f"iteration {iteration}: {error}; stopped before it changed anything that is kept") from None
        self.position = replace(self.position, iteration=iteration, held_out_loss=None)
        self.stopped = step.stop_asked
        last = iteration == self.intervals.train
        if self.history:
            self._recent.append(step)
        if self.history and (iteration % self.intervals.log == 0 or last or self.stopped):
            self.history.step(iteration, _values(self._recent))
            self._recent.clear()
        self.checkpoints.poll()
        if self._due() and not self.stopped:  # who asks to stop does not wait for long
            self.position = self.position.measured(self._held_out())
        if iteration % self.intervals.save == 0 or last or self._ended():
            self._save(step)

    def _save(self, step: Step) -> None:
        is_best = self._is_best()
        if is_best:
            self.position = replace(self.position, best_saved=self.position.held_out_loss)
        paused = self.history.pause() if self.history else 0.0
        self.checkpoints.save(self.position.iteration, self.describe(self.position, step), best=is_best)
        if self.history:
            self.history.plot()
            self.history.resume(paused)

    def _is_best(self) -> bool:
        loss, best = self.position.held_out_loss, self.position.best_saved
        return loss is not None and (best is None or loss < best)

    def _held_out(self) -> float:
        paused = self.history.pause() if self.history else 0.0
        loss = self.trainer.evaluate(self.valid, self.intervals.evaluate_for)[1]
        if not math.isfinite(loss):
            raise TrainingError(f"the held-out loss after iteration {self.position.iteration} is {loss}")
        if self.history:
            self.history.held_out(self.position.iteration, loss)
            self.history.resume(paused)
        return loss


def _values(steps: list[Step]) -> dict[str, Any]:
    """Mean losses of some steps, and what the last of them did."""
    total, cross_entropy, divergence, unlike = (sum(values) / len(steps) for values in zip(*(step.losses for step in steps)))
    values = {"loss": total, "lr": steps[-1].lr, "grad_norm": steps[-1].grad_norm}
    values |= {"steps_left_out": sum(not step.updated for step in steps)}
    if divergence != 0.0:
        values |= {"cross_entropy": cross_entropy, "kl": divergence}
    return values if unlike == 0.0 else {**values, "hidden": unlike}
