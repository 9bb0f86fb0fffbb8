"""Everything here wants other Pythons, which ``make test-serving`` installs: VLLM_PYTHON, LLAMA_CPP_PYTHON with LLAMA_CPP (a directory
with convert_hf_to_gguf.py), TRANSFORMERS_4_PYTHON, LM_EVAL_PYTHON."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path

import pytest
import torch

from megatron_prune.runtime.stock_model import load_stock_model

TOOL = Path(__file__).resolve().parents[2] / "megatron_prune" / "serving" / "to_gguf.py"
SECONDS = 1500


def other_python(name: str) -> str:
    """A Python that an environment variable names; without it the test is skipped."""
    if not (path := os.environ.get(name)):
        pytest.skip(f"{name} names no Python: make test-serving installs one")
    return path


def results(python: str, script: str, *words: str) -> list[dict]:
    """The lines of JSON that a script in this folder prints in another Python."""
    command = [python, str(Path(__file__).parent / script), *words]
    beside = {"env": {**os.environ, "PYTHONPATH": ""}, "stdin": subprocess.DEVNULL}
    run = subprocess.run(command, capture_output=True, text=True, timeout=SECONDS, **beside)
    lines = (line.partition("RESULT ")[2] for line in run.stdout.splitlines())  # a question may stand before
    found = [json.loads(line) for line in lines if line]
    assert found, run.stdout[-2000:] + run.stderr[-4000:]
    return found


def logits(folder: Path, tokens: list[int]) -> torch.Tensor:
    """Logarithms of probabilities in transformers 5 (of ``nemotron-nas``: of the same layers in the other form), float64."""
    with torch.no_grad():
        found = load_stock_model(folder, dtype=torch.float32)(torch.tensor([tokens])).logits[0]
    return found.double().log_softmax(-1)


def to_gguf(python: str, folders: list[Path], out: Path, *, pre: str = "gpt-2") -> dict[str, dict]:
    """Folder's name → the file that llama.cpp's own converter makes of it, run by our tool, or an error."""
    converter = f"{os.environ['LLAMA_CPP']}/convert_hf_to_gguf.py"
    lines = results(python, "to_gguf.py", str(TOOL), converter, pre, str(out), *map(str, folders))
    return {Path(line.pop("folder")).name: line for line in lines}
