"""What a run tells of itself: a line a few steps, ``history.jsonl``, TensorBoard, Weights & Biases, a plot of the losses."""

from __future__ import annotations

import contextlib
import io
import json
import math
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Iterator

import torch

from megatron_prune.errors import InputError
from megatron_prune.files import staging
from megatron_prune.files.documents import parse_json, read_text
from megatron_prune.runtime.reporting import log, shown_time

HISTORY, PLOT, BOARD = "history.jsonl", "loss.png", "tensorboard"

Record = dict[str, int | float | None]
"""A line of ``history.jsonl``: the iteration, the tokens so far, and what was measured."""

LARGEST = 1e100
"""Of the numbers in a record, where they are finite."""

PEAK_TFLOPS = {"H100 PCIe": 756, "H100": 989, "H200": 989, "H800": 989, "B200": 2250, "A100": 312, "A800": 312, "L40S": 362}
"""Dense bf16 and fp16 peak of a device by a part of its name (NVIDIA's data sheets), the first match counts."""


def peak_flops(dtype: torch.dtype) -> float | None:
    """What this process's device can do at best in ``dtype``, floating-point operations per second; ``None`` if unknown."""
    if not torch.cuda.is_available() or dtype is torch.float32:
        return None
    name = torch.cuda.get_device_name()
    return next((1e12 * peak for part, peak in PEAK_TFLOPS.items() if part.lower() in name.lower()), None)


@dataclass(eq=False)
class History:
    """Kept by the main process alone.

    Args:
        folder: the run's directory.
        identity: of the run, the same when it goes on.
        flops_per_token: of training, forward and backward.
        devices: processes of the run.
        peak: of one device, if known.
        wandb: project of Weights & Biases, and the run's settings.
    """

    folder: Path
    identity: str
    train_iters: int
    tokens_per_step: int
    flops_per_token: float
    devices: int
    peak: float | None
    wandb: tuple[str, dict[str, Any]] | None = None
    records: list[dict[str, Any]] = field(default_factory=list)

    def open(self, iteration: int) -> None:
        """Go on after ``iteration`` (-1: begin): what was written of later steps is taken back."""
        from torch.utils.tensorboard import SummaryWriter

        path = self.folder / HISTORY
        self.records = [entry for entry in read_history(path) if entry["iteration"] <= iteration]
        staging.write_text(path, "".join(json.dumps(entry) + "\n" for entry in self.records))
        self._file = open(path, "a", encoding="utf-8")
        self._board = SummaryWriter(str(self.folder / BOARD), purge_step=iteration + 1)
        self._run = None
        if self.wandb:
            import wandb

            project, settings = self.wandb
            self._run = wandb.init(project=project, config=settings, dir=str(self.folder), id=self.identity, resume="allow")
        self._since, self._started = time.monotonic(), max(iteration, 0)

    def step(self, iteration: int, values: dict[str, Any]) -> None:
        """Log the mean of the steps since the last call; ``iteration`` steps are done."""
        elapsed = max(time.monotonic() - self._since, 1e-9)
        done = iteration - self._started
        speed = done * self.tokens_per_step / elapsed
        flops = speed * self.flops_per_token / self.devices
        record = {
            "iteration": iteration,
            "tokens": iteration * self.tokens_per_step,
            **values,
            "tokens_per_second": speed,
            "tflops_per_device": flops / 1e12,
            "mfu": flops / self.peak if self.peak else None,
        }
        self._keep(record)
        left = shown_time((self.train_iters - iteration) * elapsed / done)
        parts = [f"iteration {iteration}/{self.train_iters}", f"loss {values['loss']:.4f}"]
        if values.get("kl"):
            parts.append(f"kl {values['kl']:.4f}")
        parts += [f"lr {values['lr']:.3g}", "step left out" if values["grad_norm"] is None else f"norm {values['grad_norm']:.3f}"]
        parts += [f"{speed:,.0f} tokens/s", f"{flops / 1e12:.3g} TFLOP/s per device"]
        parts += [f"MFU {record['mfu']:.1%}"] if self.peak else []
        log.info("%s | %s left", " | ".join(parts), left)
        self._since, self._started = time.monotonic(), iteration

    def held_out(self, iteration: int, loss: float, name: str = "held_out") -> None:
        """Log the held-out loss after ``iteration`` steps; the time it took is not the training's."""
        self._keep({"iteration": iteration, "tokens": iteration * self.tokens_per_step, f"{name}_loss": loss})
        log.info(
            "%s loss after %d iterations: %.5f (perplexity %.3f)",
            name.replace("_", "-"),
            iteration,
            loss,
            math.exp(min(loss, 700)),
        )

    def pause(self) -> float:
        """When something else than training begins; hand it to :meth:`resume`."""
        return time.monotonic()

    def resume(self, paused: float) -> None:
        """Training goes on: the pause does not count."""
        self._since += time.monotonic() - paused

    def _keep(self, record: dict[str, Any]) -> None:
        self.records.append(record)
        with _not_worth_a_run():
            self._file.write(json.dumps(record) + "\n")
            self._file.flush()
        numbers = {key: value for key, value in record.items() if isinstance(value, (int, float)) and key != "iteration"}
        for key, value in numbers.items():
            with _not_worth_a_run():
                self._board.add_scalar(key, value, record["iteration"])
        if self._run:
            self._run.log(numbers, step=record["iteration"])

    def plot(self) -> None:
        """Draw the losses over the tokens."""
        with _not_worth_a_run():
            draw_losses({"": self.records}, self.folder / PLOT)

    def close(self) -> None:
        """Draw, and let go of the files."""
        self.plot()
        for part in (self._file, self._board):
            with _not_worth_a_run():
                part.close()
        if self._run:
            self._run.finish()


@contextlib.contextmanager
def _not_worth_a_run() -> Iterator[None]:
    """What cannot be written of the run's story does not end it; a checkpoint that cannot be written does."""
    try:
        yield
    except OSError as error:
        log.warning("the history cannot be written: %s", error)


def read_history(path: Path) -> list[dict[str, Any]]:
    """Records of a ``history.jsonl``, without a last line that was cut off; empty if there is no file.

    Raises:
        InputError: naming a line that is no record.
    """
    records: list[dict[str, Any]] = []
    lines = read_text(path, error=InputError).splitlines() if path.exists() else []
    for number, line in enumerate(lines, 1):
        try:
            record = parse_json(line, Record, f"{path}, line {number}", error=InputError, do="mend the line, or remove the file")
            counted = [record.get(name) for name in ("iteration", "tokens")]
            if not all(type(count) is int and 0 <= count < 1 << 63 for count in counted):
                raise InputError(f"{path}, line {number}", got=line[:80], needed="iteration and tokens", do="mend or remove it")
            if any(value is not None and LARGEST < abs(value) < math.inf for value in record.values()):
                needed = f"numbers up to {LARGEST:g}"  # larger ones cannot be drawn
                raise InputError(f"{path}, line {number}", got=line[:80], needed=needed, do="mend or remove it")
        except InputError:
            if number == len(lines) and not line.endswith("}"):  # a run was killed while it wrote this
                break
            raise
        records.append(record)
    return records


def draw_losses(runs: dict[str, list[dict[str, Any]]], path: Path) -> None:
    """Draw training and held-out losses of runs by name over tokens as a PNG."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 5))
    axes = figure.subplots()
    for name, records in runs.items():
        for key, style in (("loss", "-"), ("held_out_loss", "o-")):
            points = [(entry["tokens"], entry[key]) for entry in records if entry.get(key) is not None]
            if points:
                label = f"{name} {'training' if key == 'loss' else 'held out'}".strip()
                axes.plot(*zip(*points), style, label=label, alpha=0.5 if key == "loss" else 1.0, markersize=4)
    axes.set_xlabel("tokens")
    axes.set_ylabel("loss, nats per token")
    axes.grid(alpha=0.3)
    if axes.has_data():
        axes.legend()
    drawn = io.BytesIO()
    figure.savefig(drawn, format="png", dpi=120)
    staging.write_bytes(path, drawn.getvalue())
