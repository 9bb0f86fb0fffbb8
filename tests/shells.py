"""Scripts as tests run them: for good, or asked what they would give to Python."""

from __future__ import annotations

import os
import runpy
import subprocess
import sys
from pathlib import Path
from unittest import mock

ROOT = Path(__file__).resolve().parents[1]


def bash(script: str, *arguments: str, **settings: object) -> subprocess.CompletedProcess:
    environment = {**os.environ, "PYTHON": sys.executable, **{name: str(value) for name, value in settings.items()}}
    return subprocess.run(["bash", str(ROOT / script), *arguments], env=environment, capture_output=True, text=True, timeout=240)


def given_to_python(folder: Path, script: str, *arguments: str, **settings: object) -> list[str]:
    """What a script gives to Python, word by word.

    Args:
        folder: for what stands in for Python.
    """
    stub, said = folder / "python", folder / "words"
    stub.write_text(f'#!/bin/sh\nprintf "%s\\0" "$@" >"{said}"\n')
    stub.chmod(0o755)
    done = bash(script, *arguments, **settings, PYTHON=stub)
    assert done.returncode == 0, done.stderr
    return said.read_text().split("\0")[:-1]


def given_to_torchrun(folder: Path, processes: int, script: str, *arguments: str, **settings: object) -> list[str]:
    """What a script has torchrun start on so many processes of this machine."""
    words = given_to_python(folder, script, *arguments, **settings)
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes), "--max-restarts", "0"]
    assert words[: len(launcher)] == launcher
    return words[len(launcher) :]


def run_file(file: str, *arguments: str) -> int:
    """A Python file as the main program, in this process → its exit code."""
    with mock.patch.object(sys, "argv", [file, *arguments]):
        try:
            runpy.run_path(file, run_name="__main__")
        except SystemExit as left:
            return left.code or 0
    return 0
