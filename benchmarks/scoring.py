"""What scoring costs beside the passes it rides on, measured side by side.

    python benchmarks/scoring.py MODEL [--samples 8] [--seq-length 512] [--rounds 3]

MODEL is a Hugging Face directory; tokens are random. In every round, in turn: plain forward passes through all layers;
the same with the sums of ``activation`` scoring; the same with second moments of every site too; plain forward and backward
passes of the whole model; the same with ``taylor``'s, and with ``fisher``'s sums. Printed: the median over rounds of each time
as a ratio to its plain one. The aims are 1.15, 2, 1.3.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from pathlib import Path
from typing import Callable

import torch

from megatron_prune.arch.sharding import ParallelLayout
from megatron_prune.checkpoint import huggingface
from megatron_prune.importance.backward import backward_passes
from megatron_prune.importance.collect import collect
from megatron_prune.importance.gradients import collect_gradients
from megatron_prune.importance.metric import METRICS
from megatron_prune.importance.objective import OBJECTIVES
from megatron_prune.importance.statistics import CROSS_ENTROPY, Statistics
from megatron_prune.importance.walk import Walk
from megatron_prune.runtime.megatron_stage import MegatronStage
from megatron_prune.runtime.model import build_model, stop_parallel
from megatron_prune.runtime.world import World
from megatron_prune.text.tokens import Calibration


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("model")
    parser.add_argument("--samples", type=int, default=8)
    parser.add_argument("--seq-length", type=int, default=512)
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    tensors, world = huggingface.open_model(Path(options.model)).tensors, World()
    tokens = torch.randint(tensors.config.vocab_size, (options.samples, options.seq_length))
    lengths = torch.full((options.samples,), options.seq_length)
    calibration = Calibration(tokens=tokens, lengths=lengths, weights=torch.ones(options.samples, dtype=torch.float64))

    def forward(moments: frozenset[str] | None) -> None:
        stage = MegatronStage(ParallelLayout(), world, dtype=torch.float32, seq_length=options.seq_length)
        if moments is None:
            plain_forward(tensors, calibration, stage)
        else:
            with tempfile.TemporaryDirectory() as folder:
                collect(tensors, calibration, stage, Statistics(folder=Path(folder), config=tensors.config), moments, world)
        stage.close()

    def backward(metric: str | None) -> None:
        if metric is None:
            backward_passes(calibration, OBJECTIVES.get(CROSS_ENTROPY)(model), lambda count: None)
            model.module.zero_grad(set_to_none=True)
            return
        with tempfile.TemporaryDirectory() as folder:
            found = Statistics(folder=Path(folder), config=tensors.config)
            collect_gradients([METRICS.get(metric)(statistics=found)], tensors, model, calibration, found, world)

    every = frozenset({"context", "channels", "stream"})
    table = ratios(
        {
            "forward": lambda: forward(None),
            "activation / forward": lambda: forward(frozenset()),
            "second moments / forward": lambda: forward(every),
        },
        options.rounds,
    )
    model = build_model(tensors, ParallelLayout(), world, dtype=torch.float32, seq_length=options.seq_length)
    table |= ratios(
        {
            "forward and backward": lambda: backward(None),
            "taylor / forward and backward": lambda: backward("taylor"),
            "fisher / forward and backward": lambda: backward("fisher"),
        },
        options.rounds,
    )
    stop_parallel()
    for name, found in table.items():
        print(f"| {name} | {statistics.median(found):.2f} ({min(found):.2f} to {max(found):.2f}) |")


def plain_forward(tensors, calibration: Calibration, stage: MegatronStage) -> None:
    """All samples through all layers, nothing looked at."""
    Walk(tensors, calibration, stage, World()).to_the_end()


def ratios(jobs: dict[str, Callable[[], None]], rounds: int) -> dict[str, list[float]]:
    """Times of all but the first job as ratios to the first of the same round, after one round to warm up."""
    first, *others = jobs
    found: dict[str, list[float]] = {name: [] for name in others}
    for number in range(rounds + 1):
        plain = seconds(jobs[first])
        for name in others:
            taken = seconds(jobs[name])
            if number:
                found[name].append(taken / plain)
    return found


def seconds(job: Callable[[], None]) -> float:
    """Processor time of a job: the machines this runs on are shared."""
    started = time.process_time()
    job()
    return time.process_time() - started


if __name__ == "__main__":
    main()
