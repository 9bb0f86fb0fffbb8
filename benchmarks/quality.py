"""Perplexity after one shot of pruning, before any training, for a list of shapes.

    python benchmarks/quality.py MODEL --calibrate train.txt --test test.txt --second other.txt [--tp 3] [--work DIR]
        [--shapes "ffn=1152" "hidden=512 untie" "layers=24" "groups=2" "heads=6" "params=101.9M" "ffn=1152 self"] …

MODEL is a Hugging Face directory. Every shape is pruned under TP by the product's own commands and defaults, on NSAMPLES
windows of ``--calibrate`` (or on the model's own samples alone, where a shape says ``self``), and measured on the first
WINDOWS windows of the two test texts: of the kind it was calibrated on, and of another kind. Any flag of prune_llama.py can
be given after ``--``. Beside the shapes of the protocol on SmolLM2-135M-Instruct stands what the peers' own code reached
there on the first text (spec: Brown corpus, 48 windows of 512 tokens, 16 test windows).
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

SHAPES = [
    "ffn=1152",
    "hidden=512",
    "hidden=512 untie",
    "hidden=512 ffn=1152",
    "hidden=512 ffn=1152 untie",
    "layers=24",
    "groups=2",
    "heads=6",
    "params=101900000",
    "ffn=1152 self",
]
PEERS = {
    "ffn=1152": "69.8 FLAP with biases, 74.9 without",
    "hidden=512": "114.4 ModelOpt",
    "hidden=512 untie": "114.4 ModelOpt",
    "hidden=512 ffn=1152": "233.8 ModelOpt",
    "hidden=512 ffn=1152 untie": "171.2",
    "layers=24": "80.9 PruneMe, 103.0 ShortGPT",
    "params=101900000": "233.8 ModelOpt",
    "ffn=1152 self": "79.7 ModelOpt, with data",
}
FLAGS = {
    "ffn": "--ffn_hidden_size_remain",
    "hidden": "--hidden_size_remain",
    "heads": "--num_attention_heads_remain",
    "groups": "--num_query_groups_remain",
    "layers": "--num_layers_remain",
    "drop": "--drop_layers",
    "params": "--params",
    "ratio": "--ratio",
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("model")
    parser.add_argument("--calibrate", required=True, help="text to calibrate on")
    parser.add_argument("--test", required=True, help="text of the same kind")
    parser.add_argument("--second", required=True, help="text of another kind")
    parser.add_argument("--shapes", nargs="+", default=SHAPES)
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
        samples = own_samples(work, dense, options)
        print(f"| shape | parameters | {Path(options.test).name} | {Path(options.second).name} | seconds | peers |")
        print("|---|---|---|---|---|---|")
        print_row("dense", dense, 0.0, options)
        for shape in options.shapes:
            started, pruned = time.time(), work / "pruned"
            prune(shape, dense, pruned, samples, options, extra)
            print_row(shape, pruned, time.time() - started, options)


def own_samples(work: Path, dense: Path, options: argparse.Namespace) -> Path:
    """Text that the dense model samples, made once for all shapes."""
    kept = work / "samples.safetensors"
    if not kept.exists():
        sizes = ["--nsamples", options.nsamples, "--seq-length", options.seq_length, "--seed", options.seed]
        run("sample", "--load", dense, "--save", kept, *sizes, tp=options.tp)
    return kept


def prune(shape: str, dense: Path, save: Path, samples: Path, options: argparse.Namespace, extra: list[str]) -> None:
    """One shape, such as ``hidden=512 ffn=1152 untie``."""
    flags: list[object] = []
    for word in shape.split():
        name, _, value = word.partition("=")
        flags += [FLAGS[name], value] if value else ["--untie"] if name == "untie" else []
    data = [samples] if "self" in shape.split() else [f"{options.calibrate}:0.5", f"{samples}:0.5"]
    given = ["--nsamples", options.nsamples, "--seq-length", options.seq_length, "--seed", options.seed, "--data", *data]
    family = ["--target-family", "mistral"] if "hidden" in shape or "params" in shape else []
    run(
        "prune",
        "--load",
        dense,
        "--save",
        save,
        "--prune_type",
        "global",
        "--overwrite",
        *flags,
        *given,
        *family,
        *extra,
        tp=options.tp,
    )


def print_row(shape: str, checkpoint: Path, seconds: float, options: argparse.Namespace) -> None:
    """A line of the table."""
    found = [evaluate(checkpoint, text, options) for text in (options.test, options.second)]
    figures = " | ".join(f"{one['perplexity']:.2f}" for one in found)
    print(f"| {shape} | {found[0]['parameters']:,} | {figures} | {seconds:.0f} | {PEERS.get(shape, '')} |", flush=True)


def evaluate(checkpoint: Path, text: str, options: argparse.Namespace) -> dict:
    """Perplexity and parameters of a checkpoint."""
    with tempfile.TemporaryDirectory() as folder:
        output = Path(folder) / "result.json"
        sizes = ["--windows", options.windows, "--seq-length", options.seq_length]
        run("evaluate", "--load", checkpoint, "--data", text, "--output", output, *sizes, tp=options.tp)
        return json.loads(output.read_text())


def run(verb: str, *arguments: object, tp: int = 1) -> str:
    """A command of the product, under torchrun where there are several ranks → what it says."""
    start = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(tp)] if tp > 1 else [sys.executable]
    threads = {"OMP_NUM_THREADS": str(max(1, (os.cpu_count() or 1) // tp))}
    command = [*start, "-m", "megatron_prune", verb, *map(str, arguments)]
    done = subprocess.run(command, env={**os.environ, **threads}, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{' '.join(command)}\n{done.stderr[-4000:]}")
    return done.stderr


if __name__ == "__main__":
    main()
