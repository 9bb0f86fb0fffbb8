"""Damaged files and odd flags over all verbs: a message, an exit code, nothing half-written; never a traceback or a hang.

    FUZZ_SECONDS=600 FUZZ_SEED=7 python -m pytest -m fuzz

A case is what ``SEED:NUMBER`` draws; what fails names it, and ``FUZZ_SEED=SEED FUZZ_CASE=NUMBER`` runs it alone.
"""

from __future__ import annotations

import dataclasses
import hashlib
import os
import random
import re
import shlex
import time
from pathlib import Path

import pytest
from child import run
from commands import QUICK, SLOW
from damage import FLAGS, damage, remove
from materials import Materials

from megatron_prune.verbs.table import options_of

FORBIDDEN = ("Traceback (most recent", "did not foresee", "panicked at", "weights_only=False", "trust_remote_code", "\x1b[")


def case(seed: str, commands: list[str], materials: Materials, folder: Path) -> list[str]:
    """Run what a seed draws; what is wrong with how it ended."""
    draw = random.Random(seed)
    command = draw.choice(commands)
    folder.mkdir()
    inputs, outputs = folder / "in", folder / "out"
    inputs.mkdir()
    outputs.mkdir()
    names = list(dict.fromkeys(re.findall(r"\{([^}]+)\}", command)))
    for name in names:
        materials.copy(name, inputs)
    done = []
    if draw.random() < 0.65:
        done.append(damage(inputs / draw.choice(names), draw))
    words = [re.sub(r"\{([^}]+)\}", lambda found: str(inputs / found[1]), word) for word in command.split()]
    words = [word.replace("OUT", str(outputs / "it")) for word in words]
    while not done or draw.random() < 0.3:
        flag = odd_flag(words, draw)
        words += flag
        done.append(" ".join(map(repr, flag)))
    before = state(inputs)
    ended = run(words, folder)
    problems = [f"{word!r} was printed" for word in FORBIDDEN if word in ended.said]
    if ended.code not in (0, 1, 2):
        problems.append(f"it ended with {ended.code}" if ended.code is not None else "it did not end")
    if ended.code and ended.code > 0 and (left := written(outputs, ended.code)):
        problems.append(f"it ended with {ended.code} and left {left}")
    if ended.code and not ended.said.strip():
        problems.append("it said nothing")
    if state(inputs) != before:
        problems.append("it changed its inputs")
    if problems:
        problems += [f"case {seed}", f"megatron-prune {shlex.join(words)}", *done, ended.said[-3000:]]
    remove(folder)
    return problems


def odd_flag(words: list[str], draw: random.Random) -> list[str]:
    """A flag of the verb with a value that may not fit."""
    kind = options_of(" ".join(words[: 2 if words[0] == "vocab" else 1]))
    item = draw.choice([item for item in dataclasses.fields(kind) if item.name not in WRITES and item.metadata])
    spelled = f"--{item.name}"
    return [spelled] if item.default is False else [spelled, draw.choice(FLAGS)]


WRITES = {
    "save",
    "output",
    "save_plan",
    "save_ids",
    "report",
    "text",
    "overwrite",
} | {
    "data_cache_path",
    "wandb_project",
    "workers",
    "max_new_tokens",
}
"""Not drawn: they would write anywhere, or rightly take very long."""


def state(folder: Path) -> str:
    """A digest of all files of a directory."""
    found = hashlib.sha256()
    for path in sorted(folder.rglob("*")):
        found.update(str(path.relative_to(folder)).encode())
        if path.is_file():
            found.update(path.read_bytes())
    return found.hexdigest()


def written(outputs: Path, code: int) -> list[str]:
    """What a command that failed left: nothing on bad input, and nothing but hidden work that goes on on anything else."""
    names = sorted(path.name for path in outputs.iterdir())
    return names if code == 2 else [name for name in names if not name.startswith(".")]


def test_a_short_seeded_part(materials, tmp_path):
    problems = [case(f"suite:{number}", QUICK[:10], materials, tmp_path / str(number)) for number in range(24)]
    assert not any(problems), "\n".join(map("\n".join, filter(None, problems)))


@pytest.mark.fuzz
@pytest.mark.timeout(0)
def test_for_a_given_time(materials, tmp_path):
    seed = os.environ.get("FUZZ_SEED") or str(random.SystemRandom().randrange(1 << 32))
    seconds, only = float(os.environ.get("FUZZ_SECONDS", 60)), os.environ.get("FUZZ_CASE")
    end, number, found = time.monotonic() + seconds, 0, []
    while not only and time.monotonic() < end or only and not number:
        drawn = int(only) if only else number
        problems = case(f"{seed}:{drawn}", QUICK + SLOW, materials, tmp_path / str(drawn))
        if problems:
            found.append("\n".join(problems))
            print(f"\nFUZZ_SEED={seed} FUZZ_CASE={drawn} python -m pytest -m fuzz\n{found[-1]}", flush=True)
        number += 1
    print(f"\n{number} cases of FUZZ_SEED={seed}, {len(found)} failed", flush=True)
    assert not found, "\n\n".join(found)
