"""Runs of ``recover`` from beginning to end: stopped, killed, out of room, gone wrong, gone on with, and what they leave.

What is compared with an uninterrupted run is compared bit by bit where the layout is the same: the same sums in the same
order. At another layout the order of sums differs, by 1e-7 of a loss in float32.
"""

from __future__ import annotations

import json
import math
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy
import pytest
import rank_jobs
import rank_jobs_recovery as jobs
import recovery_reference as reference
import tiny as tiny_module
import torch
from ranks import RankFailed
from tiny import state_dict

from megatron_prune.checkpoint import staging
from megatron_prune.cli import main
from megatron_prune.errors import InputError
from megatron_prune.recovery.trainer import TrainingError
from megatron_prune.runtime.world import World
from megatron_prune.steps.convert import ConvertOptions, convert
from megatron_prune.steps.export import ExportOptions, export

LENGTH, BATCH, STEPS, HELD_OUT, SEED, SPLIT = 18, 6, 6, 1, 77, "60,30,10"
EXACT = ("loss", "grad_norm", "lr", "steps_left_out", "held_out_loss")
"""What does not depend on the machine's speed."""


@pytest.fixture(scope="module")
def home(tmp_path_factory, tiny) -> Path:
    """A model in float32 as ``hf`` and ``m``, a teacher ``taught``, one of another vocabulary ``other``, and a pair ``text``."""
    home = tmp_path_factory.mktemp("home")
    changes = {"m": {}, "taught": {"seed": 5, "num_hidden_layers": 2}, "other": {"vocab_size": 400}}
    for name, change in changes.items():
        convert(ConvertOptions(load_dir=str(tiny("llama", dtype="float32", **change)), save_dir=str(home / name)), World())
    os.symlink(tiny("llama", dtype="float32"), home / "hf")
    reference.write_pair(home / "text", reference.documents(40))
    return home


@pytest.fixture(scope="module")
def options(home):
    """``options(save, lr=…)``: those of a short run."""

    def make(save: Path, **changes) -> dict[str, Any]:
        common = {"load": str(home / "m"), "data_path": (str(home / "text"),), "split": SPLIT, "seq_length": LENGTH}
        common |= {"train_iters": STEPS, "global_batch_size": BATCH, "micro_batch_size": 3, "eval_iters": HELD_OUT}
        common |= {"save_interval": 2, "log_interval": 1, "lr": 3e-3, "min_lr": 1e-3, "lr_warmup_iters": 1, "seed": SEED}
        return {**common, "save": str(save), **changes}

    return make


@pytest.fixture(scope="module")
def run(options):
    """``run(save, {4: "stop"}, lr=…)`` in this process → its exit code."""

    def start(save: Path, events: dict[int, str] | None = None, *, plots: bool = False, **changes) -> int:
        return jobs.recover(World(), options(save, **changes), events, plots=plots)

    return start


@pytest.fixture(scope="module")
def whole(run, tmp_path_factory):
    """``whole(bf16=True, …)`` → directory of an uninterrupted run, made once."""
    made: dict[str, Path] = {}

    def get(**changes) -> Path:
        key = repr(sorted(changes.items()))
        if key not in made:
            made[key] = tmp_path_factory.mktemp("whole") / "run"
            assert run(made[key], **changes) == 0
        return made[key]

    return get


def history(save: Path) -> list[tuple]:
    """Iteration and values of every record."""
    records = [json.loads(line) for line in (save / "history.jsonl").read_text().splitlines()]
    return [(record["iteration"], *((name, record[name]) for name in EXACT if name in record)) for record in records]


def held_out(save: Path) -> dict[int, float]:
    """Iteration → loss."""
    return {record[0]: dict(record[1:])["held_out_loss"] for record in history(save) if "held_out_loss" in dict(record[1:])}


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    """Every tensor of a checkpoint, the optimizer's too, as megatron-core reads them without a model."""
    from megatron.core import dist_checkpointing
    from megatron.core.safe_globals import register_safe_globals

    register_safe_globals()
    return {name: value for name, value in dist_checkpointing.load_plain_tensors(str(folder)).items() if torch.is_tensor(value)}


def same_tensors(left: Path, right: Path) -> None:
    mine, wanted = tensors(left), tensors(right)
    assert set(mine) == set(wanted)
    assert sum("exp_avg" in name for name in wanted) > 20
    for name, value in wanted.items():
        assert torch.equal(mine[name], value), name


def names(save: Path) -> list[str]:
    """What a run left, but for what every run leaves."""
    always = {"data_cache", "history.jsonl", "run.json", "tensorboard", "latest_checkpointed_iteration.txt", "summary.json"}
    return sorted(set(os.listdir(save)) - always)


def same_end(save: Path, wanted: Path) -> None:
    """A run came to the end of another, bit by bit, and left nothing beside."""
    assert history(save) == history(wanted)
    assert names(save) == names(wanted)
    assert os.readlink(save / "best") == os.readlink(wanted / "best")
    same_tensors(save / f"iter_{STEPS:07d}", wanted / f"iter_{STEPS:07d}")
    ours, theirs = (json.loads((each / "summary.json").read_text()) for each in (save, wanted))
    free = ("tokens_per_second", "checkpoint")
    assert {k: v for k, v in ours.items() if k not in free} == {k: v for k, v in theirs.items() if k not in free}


# --------------------------------------------------------------------------------------------------------------- going on


@pytest.mark.parametrize("precision", [{}, {"bf16": True}, {"fp16": True, "initial_loss_scale": 2.0**14}])
def test_a_run_that_was_stopped_goes_on_to_the_same_bits(run, whole, tmp_path, precision):
    save = tmp_path / "run"
    assert run(save, {2: "stop"}, **precision) == 143
    assert names(save) == ["best", "iter_0000002", "iter_0000003"]
    assert json.loads((save / "summary.json").read_text())["finished"] is False
    assert run(save, {4: "stop"}, **precision) == 143
    assert run(save, **precision) == 0
    same_end(save, whole(**precision))


def test_a_run_that_is_stopped_by_the_keyboard_saves_too(run, whole, tmp_path, monkeypatch):
    monkeypatch.setattr(jobs.signal, "SIGTERM", signal.SIGINT)
    assert run(tmp_path / "run", {2: "stop"}) == 143
    monkeypatch.undo()
    assert run(tmp_path / "run") == 0
    same_end(tmp_path / "run", whole())
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_a_distilled_run_goes_on_to_the_same_bits(run, whole, home, tmp_path):
    taught = {"teacher": str(home / "taught"), "distill_weight": 0.5, "distill_temperature": 2.0}
    assert run(tmp_path / "run", {2: "stop"}, **taught) == 143
    assert run(tmp_path / "run", **taught) == 0
    same_end(tmp_path / "run", whole(**taught))
    assert history(whole(**taught)) != history(whole())


@pytest.mark.parametrize("moment", ["writing", "commit", "tracker", "best", "rotation"])
def test_a_kill_while_a_checkpoint_is_written_loses_no_other_and_the_next_run_mends_the_rest(run, whole, tmp_path, moment):
    save, at = tmp_path / "run", 6 if moment == "rotation" else 4
    with pytest.raises(jobs.Killed):
        run(save, {at: f"killed in {moment}"})
    left = names(save)
    done = moment in ("tracker", "best", "rotation")
    assert (f"iter_{at:07d}" in left) is done and f"iter_{at - 2:07d}" in left
    assert (f".iter_{at:07d}.partial" in left) is not done
    tracked = int((save / "latest_checkpointed_iteration.txt").read_text())
    assert tracked == (at if moment in ("best", "rotation") else at - 2)
    assert run(save) == 0
    same_end(save, whole())


def test_a_kill_before_the_first_checkpoint_begins_anew(run, whole, tmp_path):
    with pytest.raises(jobs.Killed):
        run(tmp_path / "run", {2: "killed in commit"})
    assert run(tmp_path / "run") == 0
    same_end(tmp_path / "run", whole())


def test_a_finished_run_has_nothing_to_do(run, whole, tmp_path):
    save = whole()
    before = {path: path.stat().st_mtime_ns for path in save.glob("iter_*/*")}, history(save)
    assert run(save) == 0
    assert ({path: path.stat().st_mtime_ns for path in save.glob("iter_*/*")}, history(save)) == before


def test_a_run_goes_on_at_any_other_layout(ranks, options, whole, tmp_path, home):
    save = tmp_path / "run"
    sizes = lambda tp, pp: {"tensor_model_parallel_size": tp, "pipeline_model_parallel_size": pp}
    courses = [
        (2, {**sizes(2, 1), "sequence_parallel": True}, {1: "stop"}),  # stops after 2
        (2, {**sizes(1, 2), "micro_batch_size": 1, "recompute_granularity": "full"}, {2: "stop"}),
        (3, sizes(3, 1), {3: "stop"}),
        (2, {**sizes(1, 1), "micro_batch_size": 1}, {4: "stop"}),  # two copies
    ]
    for number, (size, changes, events) in enumerate(courses):
        events = {step + number * 0 + 0: what for step, what in events.items()}
        assert ranks(size).run(jobs.recover, options(save, **changes), events, size - 1) == [143] * size
    assert jobs.recover(World(), options(save, **sizes(1, 1))) == 0
    found, wanted = history(save), history(whole())
    assert [[name for name, _ in record[1:]] for record in found] == [[name for name, _ in record[1:]] for record in wanted]
    assert [record[0] for record in found] == [record[0] for record in wanted]
    for mine, other in zip(found, wanted):
        assert [value for _, value in mine[1:]] == pytest.approx([value for _, value in other[1:]], rel=3e-6)
    mine, other = tensors(save / "iter_0000006"), tensors(whole() / "iter_0000006")
    assert set(mine) == set(other)
    for name, value in other.items():
        assert (mine[name] - value).norm() <= 1e-5 * value.norm(), name


@pytest.mark.parametrize(
    "changes",
    [
        {"train_iters": 8, "lr_decay_iters": 6},
        {"seq_length": 16},
        {"seed": 1},
        {"global_batch_size": 12},
        {"lr": 1e-3, "weight_decay": 0.0},
        {"split": "50,40,10"},
        {"bf16": True},
        {"adam_beta2": 0.9},
        {"lr_decay_style": "linear"},
        {"distill_weight": 0.5},
    ],
    ids=lambda changes: " ".join(changes),
)
def test_other_settings_than_a_run_was_begun_with_are_refused_by_name(run, whole, changes):
    save = whole()
    before = {path: path.stat().st_mtime_ns for path in save.rglob("*")}
    with pytest.raises(InputError) as error:
        run(save, **changes)
    for name in changes:
        assert re.search(rf"--{name.replace('_', '-')} {changes[name]}", str(error.value))
    assert {path: path.stat().st_mtime_ns for path in save.rglob("*")} == before


def test_another_model_or_other_data_are_refused_too(run, whole, home):
    with pytest.raises(InputError, match="--start"):
        run(whole(), load=str(home / "taught"))
    with pytest.raises(InputError, match="--teacher"):
        run(whole(), teacher=str(home / "taught"))
    with pytest.raises(InputError, match="--data-path"):
        run(whole(), data_path=("1", str(home / "text")))


def test_what_is_no_part_of_the_run_may_change(run, whole, tmp_path):
    save = tmp_path / "run"
    assert run(save, {2: "stop"}) == 143
    free = {"micro_batch_size": 2, "save_interval": 3, "keep": 9, "eval_interval": 1, "early_stop": 50, "log_interval": 3}
    assert run(save, recompute_granularity="full", **free) == 0
    assert names(save) == ["best", "iter_0000002", "iter_0000003", "iter_0000006"]
    last = [record for record in history(save) if record[0] == 6 and "loss" in dict(record[1:])]
    wanted = [dict(record[1:])["loss"] for record in history(whole()) if record[0] > 3 and "loss" in dict(record[1:])]
    assert len(last) == 1 and dict(last[0][1:])["loss"] == pytest.approx(sum(wanted) / 3, rel=1e-6)  # mean of 4, 5, 6
    assert set(held_out(save)) == {0, 2, 3, 4, 5, 6}


def test_two_runs_at_once_are_kept_apart_and_overwrite_begins_anew(run, whole, tmp_path):
    save = tmp_path / "run"
    assert run(save, {2: "stop"}) == 143
    staging.hold(save.absolute())
    try:
        other = [sys.executable, "-c", f"from megatron_prune.checkpoint import staging as s, sys; s.hold({str(save)!r})"]
        other[2] = f"import pathlib; from megatron_prune.checkpoint import staging; staging.hold(pathlib.Path({str(save)!r}))"
        done = subprocess.run(other, capture_output=True, text=True)
        assert done.returncode == 1 and "another run" in done.stderr
    finally:
        staging._unlock(staging._locks.pop(save.absolute()))
    (save / "stray").mkdir()
    assert run(save, overwrite=True) == 0
    same_end(save, whole())
