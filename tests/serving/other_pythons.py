"""Everything here wants other Pythons, which ``make test-serving`` installs: VLLM_PYTHON, LLAMA_CPP_PYTHON with LLAMA_CPP (a directory
with convert_hf_to_gguf.py), TRANSFORMERS_4_PYTHON."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path

import pytest
import torch

from megatron_prune.runtime.stock_model import load_stock_model

TOOL = Path(__file__).resolve().parents[2] / "tools" / "gguf" / "convert.py"
SECONDS = 1500


def other_python(name: str) -> str:
    """A Python that an environment variable names; without it the test is skipped."""
    if not (path := os.environ.get(name)):
        pytest.skip(f"{name} names no Python: make test-serving installs one")
    return path


def results(python: str, script: str, *words: str) -> list[dict]:
    """The lines of JSON that a script in this folder prints in another Python."""
    command = [python, str(Path(__file__).parent / script), *words]
    run = subprocess.run(command, capture_output=True, text=True, timeout=SECONDS, env={**os.environ, "PYTHONPATH": ""})
    lines = run.stdout.splitlines()
    found = [json.loads(line.removeprefix("RESULT ")) for line in lines if line.startswith("RESULT ")]
    assert found, run.stdout[-2000:] + run.stderr[-4000:]
    return found


def logits(folder: Path, tokens: list[int]) -> torch.Tensor:
    """Logarithms of probabilities in transformers 5 (of ``nemotron-nas``: of the same layers in the other form), float64."""
    with torch.no_grad():
        found = load_stock_model(folder, dtype=torch.float32)(torch.tensor([tokens])).logits[0]
    return found.double().log_softmax(-1)


def to_gguf(python: str, folder: Path, file: Path, *, pre: str | None = "gpt-2") -> subprocess.CompletedProcess:
    """llama.cpp's own converter, run by our tool."""
    named = ["--pre", pre] if pre else []
    command = [python, str(TOOL), f"{os.environ['LLAMA_CPP']}/convert_hf_to_gguf.py", str(folder), *named]
    command += ["--outfile", str(file), "--outtype", "f32"]
    return subprocess.run(command, capture_output=True, text=True, timeout=SECONDS)
