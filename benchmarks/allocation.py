"""Perplexity of free shapes against the best uniform one with as many parameters, before any training.

    python benchmarks/allocation.py MODEL --calibrate train.txt --test test.txt --second other.txt [--tp 1] [--work DIR]
        [--params 101.9M 114.6M] [--search 3] [-- flags of prune]

MODEL is a Hugging Face directory (the protocol's: SmolLM2-135M-Instruct). It is scored once, with the costs of its blocks
(``score --costs``), on NSAMPLES windows of ``--calibrate`` and as many of its own samples. Every budget is then dealt out twice,
with the product's own defaults: ``--allocate uniform --search N``, and ``--allocate free``. Both are measured on the first WINDOWS
windows of two texts: of the kind that was calibrated on, and of another kind. A second table has what the prunings themselves
compared. Two budgets take some three hours on 2 cores.
"""

from __future__ import annotations

import argparse
import json
import re
import tempfile
import time
from pathlib import Path

from quality import evaluate, own_samples, run


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("model")
    parser.add_argument("--calibrate", required=True, help="text to calibrate on")
    parser.add_argument("--test", required=True, help="text of the same kind")
    parser.add_argument("--second", required=True, help="text of another kind")
    parser.add_argument("--params", nargs="+", default=["101.9M"])
    parser.add_argument("--search", type=int, default=3, help="uniform shapes that are fitted and compared")
    parser.add_argument("--tp", type=int, default=1)
    parser.add_argument("--nsamples", type=int, default=48)
    parser.add_argument("--windows", type=int, default=16)
    parser.add_argument("--seq-length", type=int, default=512)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--work", default=None, help="where to write; what is there is used again")
    options, extra = parser.parse_known_args()
    extra = [word for word in extra if word != "--"]
    with tempfile.TemporaryDirectory() as temporary:
        work = Path(options.work or temporary).absolute()
        work.mkdir(parents=True, exist_ok=True)
        dense = work / "dense"
        if not dense.exists():
            run("convert", "--load", options.model, "--save", dense, "--target-tensor-parallel-size", options.tp)
        print(f"scored with costs in {scored(work, dense, options):.0f} seconds\n")
        print(f"| shape | parameters | {Path(options.test).name} | {Path(options.second).name} | seconds |")
        print("|---|---|---|---|---|")
        compared: list[tuple[str, str]] = []
        print_row("dense", dense, 0.0, options)
        for params in options.params:
            for how in (["uniform", "--search", options.search], ["free"]):
                started, save = time.time(), work / f"{params}_{how[0]}"
                given = ["--load", dense, "--save", save, "--scores", work / "scores", "--seed", options.seed, "--overwrite"]
                said = run(
                    "prune", *given, "--params", params, "--prune_type", "global", "--allocate", *how, *extra, tp=options.tp
                )
                print_row(f"{params} {how[0]}: {shape(save)}", save, time.time() - started, options)
                compared += re.findall(r"INFO: (.*): ([\d.]+) nats a token lost on held-out text", said)
        print("\n| shape that was fitted and compared | nats a token lost on held-out text |\n|---|---|")
        for found in compared:
            print("| {} | {} |".format(*found))


def scored(work: Path, dense: Path, options: argparse.Namespace) -> float:
    """Seconds that scores and costs took; 0 where they are there already."""
    samples, started = own_samples(work, dense, options), time.time()
    if (work / "scores").exists():
        return 0.0
    data = ["--data", f"{options.calibrate}:0.5", f"{samples}:0.5", "--nsamples", options.nsamples]
    sizes = ["--seq-length", options.seq_length, "--seed", options.seed]
    run("score", "--load", dense, "--save", work / "scores", "--costs", *data, *sizes, tp=options.tp)
    return time.time() - started


def shape(checkpoint: Path) -> str:
    """The sizes that a plan changed; of each layer, where these differ."""
    plan = json.loads(next(checkpoint.glob("*/plan.json")).read_text())
    changed = {name: size for name, size in plan["new"].items() if size != plan["old"][name]}
    return ", ".join(f"{name} {' '.join(map(str, size)) if isinstance(size, list) else size}" for name, size in changed.items())


def print_row(name: str, checkpoint: Path, seconds: float, options: argparse.Namespace) -> None:
    """A line of the table."""
    found = [evaluate(checkpoint, text, options) for text in (options.test, options.second)]
    figures = " | ".join(f"{one['perplexity']:.2f}" for one in found)
    print(f"| {name} | {found[0]['parameters']:,} | {figures} | {seconds:.0f} |", flush=True)


if __name__ == "__main__":
    main()
