"""Time and memory of conversion, pruning and export against a plain copy of the same bytes.

    python benchmarks/conversion.py [--gigabytes 2] [--rounds 5] [--tp 4] [--work DIR]

A synthetic Llama is written to disk; then, round after round and side by side, its files are copied (read, written,
synced) and each step is run as a process of its own. Printed: the time of each as a ratio to the copy of the same round
(median, minimum, maximum), both of the whole process and without its start (imports), and the step's peak memory
above that of a process that imports the same and does nothing, in units of the largest tensor.
"""

from __future__ import annotations

import argparse
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from math import prod
from pathlib import Path

import torch

from megatron_prune.arch.model import ModelConfig
from megatron_prune.arch.tensors import tensor_ids, tensor_shape
from megatron_prune.checkpoint import huggingface
from megatron_prune.families.family import FAMILIES

SIZES = {"hidden_size": 2048, "ffn_hidden_size": 5632, "num_attention_heads": 32, "num_query_groups": 4, "kv_channels": 64}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--gigabytes", type=float, default=2.0)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--tp", type=int, default=4)
    parser.add_argument("--work", default=None, help="where to write (default: a temporary directory)")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=options.work) as folder:
        work = Path(folder)
        config = write_model(work / "hf", options.gigabytes * 1e9)
        steps = {
            "convert torch_dist": ["convert", "--load-dir", "hf", "--save-dir", "dist", "--ckpt-format", "torch_dist"],
            "convert torch": ["convert", "--load-dir", "hf", "--save-dir", "legacy", "--ckpt-format", "torch"],
            "transfer to TP 1": ["transfer", "--load-dir", "dist", "--save-dir", "tp1"],
            "export": ["export", "--load-dir", "dist", "--save-dir", "back"],
            "prune ffn by plan": ["prune", "--load", "dist", "--save", "pruned", "--plan", "plan.json"],
        }
        for name in ("convert torch_dist", "convert torch"):
            steps[name] += ["--target-tensor-parallel-size", str(options.tp)]
        steps["prune ffn by plan"] += ["--tensor-model-parallel-size", "1"]
        run(work, steps["convert torch_dist"])
        plan = ["prune", "--load", "dist", "--save", "pruned", "--tensor-model-parallel-size", "1", "--metric", "random"]
        run(work, [*plan, "--ffn_hidden_size_remain", str(config.ffn_hidden_size * 3 // 4), "--save-plan", "plan.json"])
        measure(work, steps, config, options.rounds)


def measure(work: Path, steps: dict[str, list[str]], config: ModelConfig, rounds: int) -> None:
    """Run everything side by side and print the table."""
    largest = max(prod(tensor_shape(tensor.role, config)) for tensor in tensor_ids(config)) * 2
    size = sum(file.stat().st_size for file in (work / "hf").glob("*.safetensors"))
    whole: dict[str, list[float]] = {name: [] for name in steps}
    bare: dict[str, list[float]] = {name: [] for name in steps}
    peaks: dict[str, int] = {}
    copies = []
    for _ in range(rounds):
        copies.append(copy_once(work))
        start, idle = run(work, ["estimate", "hf"])
        for name, step in steps.items():
            for output in ("copy", "legacy", "tp1", "back", "pruned"):
                shutil.rmtree(work / output, ignore_errors=True)  # every step finds as much free memory as the copy did
            seconds, peak = run(work, step)
            whole[name].append(seconds / copies[-1])
            bare[name].append((seconds - start) / copies[-1])
            peaks[name] = max(peaks.get(name, 0), peak - idle)
    print(f"{size / 1e9:.2f} GB, largest tensor {largest / 1e6:.0f} MB; plain copy with sync {statistics.median(copies):.2f} s")
    print(f"{'step':22}{'whole process / copy':>28}{'without start / copy':>28}{'peak memory / largest tensor':>32}")
    for name in steps:
        cells = [f"{statistics.median(r):.2f} ({min(r):.2f} to {max(r):.2f})" for r in (whole[name], bare[name])]
        print(f"{name:22}{cells[0]:>28}{cells[1]:>28}{peaks[name] / largest:>32.2f}")


def copy_once(work: Path) -> float:
    """Seconds to copy the model's weight files and sync them."""
    shutil.rmtree(work / "copy", ignore_errors=True)
    (work / "copy").mkdir()
    start = time.perf_counter()
    for file in sorted((work / "hf").glob("*.safetensors")):
        shutil.copyfile(file, work / "copy" / file.name)
        number = os.open(work / "copy" / file.name, os.O_RDONLY)
        os.fsync(number)
        os.close(number)
    return time.perf_counter() - start


_CHILD = """
import sys
from megatron_prune.cli.main import main
main(sys.argv[1:])
print("peak", next(line.split()[1] for line in open("/proc/self/status") if line.startswith("VmHWM")))
"""


def run(work: Path, step: list[str]) -> tuple[float, int]:
    """Seconds and peak resident bytes of one step in a process of its own; its output of an earlier round is removed.

    The process reads its own peak at the end: what the system tells its parent would count the parent's memory too.
    """
    for flag in ("--save-dir", "--save"):
        if flag in step:
            shutil.rmtree(work / step[step.index(flag) + 1], ignore_errors=True)
    start = time.perf_counter()
    done = subprocess.run([sys.executable, "-c", _CHILD, *step], cwd=work, capture_output=True, text=True)
    seconds = time.perf_counter() - start
    if done.returncode:
        raise SystemExit(f"{step[0]} failed:\n{done.stderr}")
    return seconds, int(done.stdout.split("peak")[-1]) * 1024


def write_model(path: Path, target_bytes: float) -> ModelConfig:
    """A synthetic bf16 Llama of about ``target_bytes``, random numbers, in files of at most 1 GB."""
    path.mkdir()
    family = FAMILIES.get("llama")
    sizes = {**SIZES, "vocab_size": 32000, "tie_embeddings": False}
    layer = 2 * (2 * 2048 * 2048 + 2 * 256 * 2048 + 3 * 2048 * 5632)
    layers = max(2, round((target_bytes - 4 * 32000 * 2048) / layer))
    config = ModelConfig(num_layers=layers, **sizes)
    dtypes = {tensor: torch.bfloat16 for tensor in tensor_ids(config)}
    hf_config = family.hf_config(config, None)
    huggingface.lay_out(path, config, family, hf_config, dtypes, max_shard_bytes=10**9)
    tensors = huggingface.open_model(path).tensors
    generator = torch.Generator().manual_seed(0)
    for tensor in tensor_ids(config):
        data = torch.randn(tensor_shape(tensor.role, config), generator=generator).bfloat16()
        for region, _, _ in tensors.tiles[tensor]:
            region.write_from(data)
    return config


if __name__ == "__main__":
    main()
