"""Runs of ``recover`` from beginning to end: stopped, killed, out of room, gone wrong, gone on with, and what they leave.

What is compared with an uninterrupted run is compared bit by bit where the layout is the same: the same sums in the same
order. At another layout the order of sums differs, by 1e-7 of a loss in float32.
"""

from __future__ import annotations

import fcntl
import io
import json
import math
import os
import pickle
import re
import shutil
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

from megatron_prune.cli.main import main
from megatron_prune.errors import CheckpointError, InputError
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
    changes = {"m": {}, "taught": {"seed": 5, "intermediate_size": 132}, "other": {"vocab_size": 400}}
    for name, change in changes.items():
        source = tiny("llama", dtype="float32", num_hidden_layers=2, **change)
        convert(ConvertOptions(load=str(source), save=str(home / name)), World())
        os.symlink(source, home / {"m": "hf"}.get(name, f"{name}-hf"))
    reference.write_pair(home / "text", reference.documents(40))
    return home


@pytest.fixture(scope="module")
def options(home):
    """``options(save, lr=…)``: those of a short run."""

    def make(save: Path, **changes) -> dict[str, Any]:
        common = {"load": str(home / "m"), "data_path": (str(home / "text"),), "split": SPLIT, "seq_length": LENGTH}
        common |= {"train_iters": STEPS, "global_batch_size": BATCH, "micro_batch_size": 6, "eval_iters": HELD_OUT}
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
    from megatron.core.safe_globals import SAFE_GLOBALS

    World().connect(always=True)
    with torch.serialization.safe_globals(SAFE_GLOBALS):
        found = dist_checkpointing.load_plain_tensors(str(folder))
    return {name: value for name, value in found.items() if torch.is_tensor(value)}


def same_tensors(left: Path, right: Path) -> None:
    mine, wanted = tensors(left), tensors(right)
    assert set(mine) == set(wanted)
    assert sum("exp_avg" in name for name in wanted) > 10
    for name, value in wanted.items():
        assert torch.equal(mine[name], value), name


def names(save: Path) -> list[str]:
    """What a run left, but for what every run leaves."""
    always = {"data_cache", "history.jsonl", "run.json", "tensorboard", "latest_checkpointed_iteration.txt", "summary.json"}
    return sorted(set(os.listdir(save)) - always)


def same_end(save: Path, wanted: Path, kept: tuple[int, ...] = (4, 6)) -> None:
    """A run came to the end of another, bit by bit, and left nothing beside."""
    assert history(save) == history(wanted)
    assert names(save) == ["best", *(f"iter_{number:07d}" for number in kept)]
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
    assert precision or run(save, {4: "stop"}) == 143
    assert run(save, **precision) == 0
    same_end(save, whole(**precision), kept=(4, 6) if precision else (5, 6))


def test_a_run_that_is_stopped_by_the_keyboard_saves_too(run, whole, tmp_path):
    before = signal.getsignal(signal.SIGINT)
    assert run(tmp_path / "run", {2: "interrupt"}) == 143
    assert run(tmp_path / "run") == 0
    same_end(tmp_path / "run", whole())
    assert signal.getsignal(signal.SIGINT) is before


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
    courses = [  # the last of the ranks is asked to stop
        (2, {**sizes(2, 1), "sequence_parallel": True}, {2: "asked"}),
        (2, {**sizes(1, 2), "micro_batch_size": 1, "recompute_granularity": "full"}, {3: "asked"}),
        (3, sizes(3, 1), {4: "asked"}),
        (2, {**sizes(1, 1), "micro_batch_size": 1}, {5: "asked"}),  # two copies
    ]
    for size, changes, events in courses:
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
        {"train_iters": 8},
        {"seq_length": 16},
        {"seed": 1},
        {"global_batch_size": 12},
        {"lr": 1e-3, "weight_decay": 0.0},
        {"split": "50,40,10"},
        {"bf16": True},
        {"adam_beta2": 0.9},
        {"lr_decay_style": "linear"},
        {"distill_weight": 0.7},
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
    other = os.open(save, os.O_RDONLY)
    fcntl.flock(other, fcntl.LOCK_EX)  # as a run that is at work there does
    with pytest.raises(InputError, match="another run"):
        run(save)
    os.close(other)
    (save / "stray").mkdir()
    with pytest.raises(InputError, match="stray, which is no part of a run"):
        run(save, overwrite=True)
    (save / "stray").rmdir()
    assert run(save, overwrite=True) == 0
    same_end(save, whole())


# ------------------------------------------------------------------------------------------------------- what goes wrong


@pytest.mark.parametrize("what", ["full", "no room", "little room"])
def test_a_full_disk_stops_the_run_and_leaves_the_checkpoint_before(run, whole, tmp_path, what):
    save = tmp_path / "run"
    with pytest.raises(TrainingError, match="(?s)written.*whole: iter_0000002"):
        run(save, {4: what})
    assert names(save) == ["best", "iter_0000002"]
    assert (save / "latest_checkpointed_iteration.txt").read_text() == "2"
    assert run(save) == 0
    same_end(save, whole())


@pytest.mark.parametrize("rank", [0, 1])
def test_a_disk_that_is_full_for_one_rank_stops_all(ranks, options, tmp_path, rank):
    save = tmp_path / "run"
    sizes = {"tensor_model_parallel_size": 2}
    with pytest.raises(RankFailed) as failed:
        ranks(2).run(jobs.recover, options(save, **sizes), {4: "full"}, rank)
    assert failed.value.kinds == {0: "TrainingError", 1: "TrainingError"}
    assert names(save) == ["best", "iter_0000002"]
    assert len(tensors(save / "iter_0000002")) > 20


@pytest.mark.parametrize(
    "what, said",
    [
        ("writer killed", "rank 0's process [0-9]+, which writes it, was ended by SIGKILL; .*memory"),
        ("writer killed after a stop", "rank 0's process [0-9]+, which writes it, was ended by SIGKILL"),
        ("writer leaves", "rank 0's process [0-9]+, which writes it, ended with exit code 3"),
        ("writer fails", "ImportError: No module named 'psutil'"),
    ],
)
def test_a_writer_that_ends_in_the_middle_ends_the_run_with_its_message(run, whole, tmp_path, what, said):
    save = tmp_path / "run"
    with pytest.raises(TrainingError, match=f"(?s){said}.*whole: iter_0000002$"):
        run(save, {4: what})
    assert names(save) == ["best", "iter_0000002"]
    assert run(save) == 0
    same_end(save, whole())


@pytest.mark.parametrize("rank", [0, 1])
def test_a_writer_that_is_killed_on_one_rank_stops_all(ranks, options, tmp_path, rank):
    save, sizes = tmp_path / "run", {"tensor_model_parallel_size": 2}
    with pytest.raises(RankFailed, match=f"rank {rank}'s process.*SIGKILL") as failed:
        ranks(2).run(jobs.recover, options(save, **sizes), {4: "writer killed"}, rank)
    assert failed.value.kinds == {0: "TrainingError", 1: "TrainingError"}
    assert names(save) == ["best", "iter_0000002"]


def test_a_disk_without_room_is_seen_before_anything_is_written(run, tmp_path, monkeypatch):
    usage = type("Usage", (), {"free": 10_000})
    monkeypatch.setattr("shutil.disk_usage", lambda path: usage)
    with pytest.raises(InputError, match="(?s)not enough room for .*run\n  got: 10,000 bytes free"):
        run(tmp_path / "run")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("what, said", [("nan", "the loss.*is nan"), ("nan gradient", "the gradient.*is nan")])
def test_a_loss_or_gradient_that_is_not_finite_stops_the_run_at_its_iteration(run, whole, tmp_path, what, said):
    save = tmp_path / "run"
    with pytest.raises(TrainingError, match=f"iteration 4: {said}"):
        run(save, {4: what})
    assert names(save) == ["best", "iter_0000002"]
    assert [record[0] for record in history(save)] == [0, 1, 2, 2, 3]
    if what == "nan":
        assert run(save) == 0
        same_end(save, whole())


def test_a_loss_that_is_not_finite_on_one_rank_stops_all(ranks, options, tmp_path):
    sizes = {"tensor_model_parallel_size": 1, "micro_batch_size": 3}  # two copies
    with pytest.raises(RankFailed, match="iteration 3: the loss") as failed:
        ranks(2).run(jobs.recover, options(tmp_path / "run", **sizes), {3: "nan"}, 1)
    assert failed.value.kinds == {0: "TrainingError", 1: "TrainingError"}


def test_fp16_leaves_out_steps_that_overflow_and_goes_on(run, tmp_path):
    """The scale is halved at the second overflow in a row (megatron-core's hysteresis), until the gradients fit."""
    save = tmp_path / "run"
    assert run(save, fp16=True, initial_loss_scale=2.0**20, lr_warmup_iters=0, save_interval=6) == 0
    steps = [dict(record[1:]) for record in history(save) if "loss" in dict(record[1:])]
    left_out = [step["steps_left_out"] for step in steps]
    assert left_out[0] == 1 and 2 <= sum(left_out) <= 5
    assert [step["grad_norm"] is None for step in steps] == [bool(out) for out in left_out]
    schedule = reference.Schedule(lr=3e-3, min_lr=1e-3, decay=STEPS)
    done = numpy.cumsum([1 - out for out in left_out]) - [1 - out for out in left_out]
    assert [step["lr"] for step in steps] == pytest.approx([schedule.at(int(updates)) for updates in done])


def test_fp16_can_be_stopped_before_its_first_update(run, tmp_path):
    save, scaled = tmp_path / "run", {"fp16": True, "initial_loss_scale": 2.0**20}
    assert run(save, {1: "asked"}, **scaled) == 143
    assert run(save, **scaled) == 0
    assert run(tmp_path / "whole", **scaled) == 0
    same_end(save, tmp_path / "whole")


# ---------------------------------------------------------------------------------------------------- which checkpoints stay

WORSE = {"lr": 1.0, "min_lr": 1.0, "lr_warmup_iters": 9, "train_iters": 10, "lr_decay_iters": 10}
"""A rate that rises without end: the held-out loss falls and then rises."""


@pytest.mark.parametrize("keep", [1, 2])
def test_the_newest_and_the_best_checkpoint_stay(run, whole, keep):
    save = whole(keep=keep, **WORSE)
    losses = {iteration: loss for iteration, loss in held_out(save).items() if iteration}
    best = min(losses, key=losses.get)
    newest = sorted(losses)[-keep:]
    assert best not in newest, f"the test needs a best that is old: {losses}"
    assert names(save) == ["best", *(f"iter_{number:07d}" for number in sorted({best, *newest}))]
    assert os.readlink(save / "best") == f"iter_{best:07d}"
    assert (save / "latest_checkpointed_iteration.txt").read_text() == "10"
    summary = json.loads((save / "summary.json").read_text())
    assert (summary["start_loss"], summary["best_loss"], summary["held_out_loss"]) == (
        held_out(save)[0],
        losses[best],
        losses[10],
    )


def test_a_stop_does_not_change_which_checkpoint_is_the_best(run, whole, tmp_path):
    save, wanted = tmp_path / "run", whole(keep=2, **WORSE)
    best = int(os.readlink(wanted / "best").removeprefix("iter_"))
    assert run(save, {best: "asked"}, keep=2, **WORSE) == 143
    assert run(save, keep=2, **WORSE) == 0
    assert history(save) == history(wanted)
    assert os.readlink(save / "best") == os.readlink(wanted / "best")
    assert names(save) == names(wanted)


def test_early_stop_ends_a_run_that_no_longer_gets_better(run, whole, tmp_path):
    patient = held_out(whole(eval_interval=1, keep=10, **WORSE))
    save = tmp_path / "run"
    early = {"eval_interval": 1, "early_stop": 2, **WORSE}
    assert run(save, **early) == 0
    end = next(now for now in range(2, 11) if min(patient[now], patient[now - 1]) >= min(patient[k] for k in range(now - 1)))
    assert end < 10
    assert held_out(save) == {number: loss for number, loss in patient.items() if number <= end}
    assert names(save)[-1] == f"iter_{end:07d}"
    summary = json.loads((save / "summary.json").read_text())
    assert summary["finished"] and summary["iterations"] == end
    assert run(save, **{**early, "early_stop": 0}) == 0  # who is more patient goes on from there
    assert held_out(save) == patient


# ------------------------------------------------------------------------------------------------------ what a run leaves


def test_the_numbers_of_a_run_are_in_its_history_its_plot_and_tensorboard(run, whole, tmp_path, home):
    from PIL import Image
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    save = tmp_path / "run"
    assert run(save, {2: "stop"}, plots=True) == 143
    assert run(save, plots=True) == 0
    records = [json.loads(line) for line in (save / "history.jsonl").read_text().splitlines()]
    assert [record["iteration"] for record in records] == [0, 1, 2, 2, 3, 4, 4, 5, 6, 6]
    assert all(record["tokens"] == record["iteration"] * BATCH * LENGTH for record in records)
    board = EventAccumulator(str(save / "tensorboard")).Reload()
    for name in ("loss", "lr", "grad_norm", "held_out_loss", "tokens_per_second"):
        wanted = [(record["iteration"], record[name]) for record in records if name in record]
        found = [(event.step, event.value) for event in board.Scalars(name)]
        assert [step for step, _ in found] == [step for step, _ in wanted]
        assert [value for _, value in found] == pytest.approx([value for _, value in wanted], rel=1e-6)
    with Image.open(save / "loss.png") as image:
        image.load()
        assert image.format == "PNG" and min(image.size) > 300
        assert len(image.convert("RGB").getcolors(1 << 20)) > 10  # something is drawn
    summary = json.loads((save / "summary.json").read_text())
    speeds = [record["tokens_per_second"] for record in records if "loss" in record]
    assert summary["tokens_per_second"] == pytest.approx(sum(speeds) / len(speeds))
    assert (summary["iterations"], summary["tokens"], summary["finished"]) == (6, 6 * BATCH * LENGTH, True)
    assert summary["settings"]["lr"] == 3e-3 and summary["checkpoint"] == str(save / "iter_0000006")
    counts = (STEPS * BATCH, HELD_OUT * BATCH, HELD_OUT * BATCH)
    blend = ([str(home / "text")], None)
    _, _, test = reference.samples(blend, SPLIT, seq_length=LENGTH, seed=SEED, counts=counts)
    export(ExportOptions(load=str(save), save=str(tmp_path / "hf")), World())
    assert summary["test_loss"] == pytest.approx(reference.cross_entropy(reference.load(tmp_path / "hf"), test), rel=3e-6)


def test_the_log_may_take_several_steps_together(run, whole, tmp_path):
    save = tmp_path / "run"
    assert run(save, log_interval=4) == 0
    single = {record[0]: dict(record[1:]) for record in history(whole()) if "loss" in dict(record[1:])}
    rows = {record[0]: dict(record[1:]) for record in history(save) if "loss" in dict(record[1:])}
    assert set(rows) == {4, 6}
    for end, steps in ((4, (1, 2, 3, 4)), (6, (5, 6))):
        assert rows[end]["loss"] == pytest.approx(sum(single[step]["loss"] for step in steps) / len(steps), rel=1e-12)
        assert (rows[end]["lr"], rows[end]["grad_norm"]) == (single[end]["lr"], single[end]["grad_norm"])


def test_weights_and_biases_gets_the_same_numbers(run, whole, tmp_path, monkeypatch):
    import importlib.machinery
    import types

    logged, begun = [], []

    class Run:
        def log(self, values, step):
            logged.append((step, values))

        def finish(self):
            begun.append("finished")

    package = types.ModuleType("wandb")
    package.__spec__ = importlib.machinery.ModuleSpec("wandb", None)
    package.init = lambda **settings: begun.append(settings) or Run()
    monkeypatch.setitem(sys.modules, "wandb", package)
    save = tmp_path / "run"
    assert run(save, {1: "asked"}, wandb_project="pruned") == 143
    assert run(save, wandb_project="pruned") == 0
    assert begun[1] == begun[3] == "finished"
    assert begun[0]["project"] == "pruned" and begun[0]["config"]["lr"] == 3e-3
    assert begun[0]["id"] == begun[2]["id"]  # one run there, too
    records = [json.loads(line) for line in (save / "history.jsonl").read_text().splitlines()]
    for (step, values), record in zip(logged, records, strict=True):
        assert step == record["iteration"] and values == {k: v for k, v in record.items() if v is not None and k != "iteration"}


@pytest.mark.parametrize("which", ["iter_0000006", "best", "."])
def test_a_checkpoint_of_a_run_is_exported_to_what_transformers_runs_alike(whole, tmp_path, home, which):
    save, tokens = whole(), torch.randint(0, 307, (2, 20), generator=torch.Generator().manual_seed(2))
    export(ExportOptions(load=str(save / which), save=str(tmp_path / "hf")), World())
    ours = torch.from_numpy(rank_jobs.logits(World(), str(save / which), tokens.tolist(), 1, 1))
    theirs = tiny_module.logits(tmp_path / "hf", tokens)
    assert (ours - theirs).abs().max() < 1e-4 * theirs.std()
    assert (theirs - tiny_module.logits(home / "hf", tokens)).abs().max() > 0.01  # it was trained
    _, valid, _ = reference.samples(
        ([str(home / "text")], None), SPLIT, seq_length=LENGTH, seed=SEED, counts=(STEPS * BATCH, BATCH, BATCH)
    )
    number = 6 if which == "." else int(Path(os.path.realpath(save / which)).name.removeprefix("iter_"))
    assert held_out(save)[number] == pytest.approx(reference.cross_entropy(reference.load(tmp_path / "hf"), valid), rel=3e-6)
    recipe = json.loads((save / f"iter_{number:07d}/megatron_prune.json").read_text())["recipe"]
    assert [entry["step"] for entry in recipe][-1] == "recover"
    assert (recipe[-1]["iteration"], recipe[-1]["consumed_samples"]) == (number, number * BATCH)
    assert recipe[-1]["settings"]["lr"] == 3e-3


@pytest.mark.parametrize("tp, pp", [(1, 1), (2, 1), (1, 2)])
def test_megatron_cores_own_loader_reads_the_model_of_a_run(whole, ranks, tmp_path, tp, pp):
    folder = whole() / "iter_0000006"
    args = rank_jobs.load_common(World(), str(folder))
    assert (args["iteration"], args["consumed_train_samples"], args["num_layers"]) == (6, 6 * BATCH, 2)
    world = [World()] if tp * pp == 1 else None
    stock = rank_jobs.load_stock
    found = [stock(world[0], str(folder), args, 1, 1)] if world else ranks(tp * pp).run(stock, str(folder), args, tp, pp)
    export(ExportOptions(load=str(folder), save=str(tmp_path / "hf")), World())
    theirs = {name: value.numpy() for name, value in state_dict(tmp_path / "hf").items()}
    for rank, parameters in enumerate(found):
        stage, shard = divmod(rank, tp)
        assert not any(numpy.isnan(value).any() for value in parameters.values())
        for local in range(2 // pp):
            here, there = f"decoder.layers.{local}.", f"model.layers.{stage * 2 // pp + local}."
            rows = lambda name: numpy.split(theirs[f"{there}{name}.weight"], tp)[shard]
            columns = lambda name: numpy.split(theirs[f"{there}{name}.weight"], tp, axis=1)[shard]
            gate_up = numpy.concatenate([rows("mlp.gate_proj"), rows("mlp.up_proj")])
            assert (parameters[f"{here}mlp.linear_fc1.weight"] == gate_up).all()
            assert (parameters[f"{here}mlp.linear_fc2.weight"] == columns("mlp.down_proj")).all()
            assert (parameters[f"{here}self_attention.linear_proj.weight"] == columns("self_attn.o_proj")).all()
            heads = [rows(f"self_attn.{role}_proj").reshape(12 // tp, 1, 8, 48) for role in "qkv"]  # a group is one head
            qkv = numpy.concatenate(heads, axis=1).reshape(-1, 48)
            assert (parameters[f"{here}self_attention.linear_qkv.weight"] == qkv).all()
            assert (parameters[f"{here}input_layernorm.weight"] == theirs[f"{there}input_layernorm.weight"]).all()
        if stage == 0:
            held = parameters["embedding.word_embeddings.weight"]
            first = shard * len(held)
            real = theirs["model.embed_tokens.weight"][first : first + len(held)]
            assert (held[: len(real)] == real).all()
        if stage == pp - 1:
            assert (parameters["decoder.final_layernorm.weight"] == theirs["model.norm.weight"]).all()


def test_a_run_begins_from_a_legacy_checkpoint_and_from_one_of_another_run(run, whole, tmp_path, home):
    convert(ConvertOptions(load=str(home / "hf"), save=str(tmp_path / "old"), ckpt_format="torch"), World())
    assert run(tmp_path / "run", load=str(tmp_path / "old")) == 0
    assert history(tmp_path / "run") == history(whole())
    assert run(tmp_path / "next", load=str(whole() / "best"), train_iters=1, lr_warmup_iters=0) == 0
    assert held_out(tmp_path / "next")[0] == min(held_out(whole()).values())


# -------------------------------------------------------------------------------------------------------------- bad input

REFUSED = {
    "longer than the context": ({"seq_length": 65}, "--seq-length.*65.*64"),
    "no sequence": ({"seq_length": 1}, "--seq-length.*1"),
    "batches that do not divide": ({"micro_batch_size": 4}, "--global-batch-size 6.*micro-batches of 4.*multiple of 4"),
    "no batch": ({"global_batch_size": 0}, "--global-batch-size.*0"),
    "no steps": ({"train_iters": 0}, "--train-iters.*0"),
    "both precisions": ({"bf16": True, "fp16": True}, "--bf16 and --fp16"),
    "a loss scale of nothing": ({"fp16": True, "initial_loss_scale": 0.0}, "--initial-loss-scale"),
    "no rate": ({"lr": 0.0}, "--lr"),
    "a rate that is no number": ({"lr": math.nan}, "--lr"),
    "a least rate above the rate": ({"min_lr": 1.0}, "--min-lr"),
    "a warm-up to the end": ({"lr_warmup_iters": 6}, "--lr-warmup-iters.*6"),
    "a first moment that never forgets": ({"adam_beta1": 1.0}, "--adam-beta1"),
    "a weight decay below zero": ({"weight_decay": -0.1}, "--weight-decay"),
    "a seed below zero": ({"seed": -1}, "--seed"),
    "a patience below zero": ({"early_stop": -1}, "--early-stop"),
    "a teacher's weight above one": ({"teacher": "taught", "distill_weight": 1.5}, "--distill-weight"),
    "a temperature of zero": ({"teacher": "taught", "distill_temperature": 0.0}, "--distill-temperature"),
    "a teacher of another vocabulary": ({"teacher": "other"}, "--teacher.*400 tokens.*307"),
    "layers of a teacher that is not there": ({"hidden_weight": 1.0}, "--hidden-weight without --teacher"),
    "layers that count below zero": ({"teacher": "taught", "hidden_weight": -1.0}, "--hidden-weight.*-1.0"),
    "a layer that does not exist": ({"teacher": "taught", "hidden_weight": 1.0, "hidden_layers": (2,)}, "--hidden-layers.*2"),
    "layers that are not kept": (
        {"teacher": "taught", "hidden_weight": 1.0, "recompute_granularity": "full"},
        "--hidden-weight and --recompute-granularity full",
    ),
    "a rank of zero": ({"lora_r": 0}, "--lora-r.*0"),
    "an alpha of zero": ({"lora_r": 2, "lora_alpha": 0.0}, "--lora-alpha"),
    "a dropout of all": ({"lora_r": 2, "lora_dropout": 1.0}, "--lora-dropout"),
    "adapters of an unknown layer": ({"lora_r": 2, "lora_targets": ("q_proj", "lm_head")}, "--lora-targets.*lm_head.*q_proj"),
    "adapters of nothing": ({"lora_r": 2, "lora_targets": ()}, "--lora-targets.*nothing"),
    "no such teacher": ({"teacher": "nobody"}, "nobody"),
    "no such checkpoint": ({"load": "nothing"}, "nothing"),
    "another number of layers": ({"megatron": {"num_layers": 7}}, "--num-layers 7, the checkpoint has 2"),
    "more ranks than there are": ({"tensor_model_parallel_size": 2}, "1 process for TP 2"),
    "stages that do not divide": ({"pipeline_model_parallel_size": 3}, "PP 3"),
    "recompute of more layers than there are": (
        {"recompute_granularity": "full", "recompute_num_layers": 9},
        "--recompute-num-layers",
    ),
    "selective recompute of a number of layers": (
        {"recompute_granularity": "selective", "recompute_num_layers": 2},
        "--recompute-num-layers",
    ),
    "no data": ({"data_path": ()}, "--data-path.*neither.*preprocess"),
    "data that is not there": ({"data_path": ("gone",)}, "gone.bin"),
    "half a blend": ({"data_path": ("0.5", "text", "0.5")}, "--data-path"),
    "a split without validation": ({"split": "100,0,0"}, "--split"),
    "a split that is none": ({"split": "a,b,c"}, "--split"),
    "a place inside the checkpoint": ({"save": "m/run"}, "in the input"),
    "held-out data beside data that is cut": ({"valid_data_path": ("gone",)}, "--valid-data-path gone has no effect without"),
    "test data beside data that is cut": ({"test_data_path": ("text",)}, "--test-data-path text has no effect without"),
    "a cut of data that is not cut": (
        {"data_path": (), "train_data_path": ("text",), "valid_data_path": ("text",)},
        f"--split {SPLIT} has no effect without --data-path",
    ),
    "a scale of a loss that is not scaled": ({"initial_loss_scale": 2.0}, "--initial-loss-scale 2.0 .* without --fp16"),
    "an end of a rate that stays": ({"lr_decay_style": "constant"}, "--min-lr 0.001 has no effect without a --lr-decay-style"),
    "a fall of a rate that stays": (
        {"lr_decay_style": "constant", "min_lr": None, "lr_decay_iters": 4},
        "--lr-decay-iters 4 has no effect",
    ),
    "a share of a teacher that is not there": ({"distill_weight": 0.7}, "--distill-weight 0.7 has no effect without --teacher"),
    "a temperature of nobody": ({"distill_temperature": 2.0}, "--distill-temperature 2.0 has no effect without --teacher"),
    "layers that do not count": ({"teacher": "taught", "hidden_layers": (1,)}, "--hidden-layers 1 has no effect without"),
    "an alpha of no adapters": ({"lora_alpha": 8.0}, "--lora-alpha 8.0 has no effect without --lora-r"),
    "a dropout of no adapters": ({"lora_dropout": 0.1}, "--lora-dropout 0.1 has no effect without --lora-r"),
    "targets of no adapters": ({"lora_targets": ("q_proj", "k_proj")}, "--lora-targets q_proj k_proj has no effect without"),
    "sequences split over one rank": ({"sequence_parallel": True}, "--sequence-parallel has no effect"),
    "two kinds of recompute": (
        {"recompute_activations": True, "recompute_granularity": "full"},
        "--recompute-activations and --recompute-granularity both say",
    ),
    "a cache that is a file": ({"data_cache_path": "text.idx"}, "text.idx.*a link or a file.*needed: a directory"),
}


@pytest.mark.parametrize("what", REFUSED)
def test_bad_input_is_refused_before_anything_is_written(run, home, tmp_path, monkeypatch, what):
    monkeypatch.chdir(home)  # paths above are relative to it
    changes, pattern = REFUSED[what]
    before = sorted(str(path) for path in home.rglob("*"))
    with pytest.raises(InputError, match=f"(?s){pattern}"):
        run(**{"save": tmp_path / "run", **changes})
    assert not (tmp_path / "run").exists()
    assert sorted(str(path) for path in home.rglob("*")) == before


@pytest.mark.parametrize("damage", ["empty", "truncated", "other vocabulary", "no index"])
def test_damaged_data_is_refused_before_anything_is_written(run, tmp_path, damage):
    texts = reference.documents(40)
    if damage == "other vocabulary":
        texts[7][1] = 399
    pair = reference.write_pair(tmp_path / "text", texts)
    whole_file = Path(f"{pair}.bin").read_bytes()
    if damage in ("empty", "truncated"):
        Path(f"{pair}.bin").write_bytes(b"" if damage == "empty" else whole_file[:-10])
    elif damage == "no index":
        Path(f"{pair}.idx").write_bytes(b"MMID")
    with pytest.raises(InputError, match="token 399" if damage == "other vocabulary" else r"text\.(bin|idx)"):
        run(tmp_path / "run", data_path=(pair,))
    assert not (tmp_path / "run").exists()


class Bomb:
    """What a pickle of it would do, and then give."""

    def __init__(self, canary: Path, inner: Any):
        self.canary, self.inner = str(canary), pickle.dumps(inner)

    def __reduce__(self):
        return eval, (f"(__import__('os').mkdir({self.canary!r}), __import__('pickle').loads({self.inner!r}))[1]",)


def arm(save: Path, place: str, canary: Path) -> None:
    """Put a :class:`Bomb` where megatron-core or torch would unpickle it when the run goes on; all else stays as it was."""
    folder = save / "iter_0000003"
    metadata = pickle.loads((folder / ".metadata").read_bytes())
    if place == ".metadata":
        (folder / ".metadata").write_bytes(pickle.dumps(Bomb(canary, metadata)))
    elif place == "common.pt":
        torch.save(Bomb(canary, torch.load(folder / "common.pt", weights_only=False)), folder / "common.pt")
    elif place == "a part of common.pt":
        common = torch.load(folder / "common.pt", weights_only=False)
        torch.save(common | {"opt_param_scheduler": Bomb(canary, common["opt_param_scheduler"])}, folder / "common.pt")
    elif place == "an index":
        path = next((save / "data_cache").glob("*train-document_index.npy"))
        path.write_bytes(pickle.dumps(Bomb(canary, numpy.load(path))))
    else:
        wanted = (lambda name: "_extra_state" in name) if place == "an object" else (lambda name: "linear_fc1.weight" in name)
        for index, info in metadata.storage_data.items():
            if wanted(index.fqn):
                data = io.BytesIO()
                torch.save(Bomb(canary, [None]), data)
                with open(folder / info.relative_path, "ab") as file:
                    info.offset, info.length = file.tell(), len(data.getvalue())
                    file.write(data.getvalue())
        (folder / ".metadata").write_bytes(pickle.dumps(metadata))
    described = json.loads((folder / "megatron_prune.json").read_text())
    (folder / "megatron_prune.json").write_text(json.dumps({**described, "files": {}}))  # nor is that in the way


@pytest.fixture(scope="module")
def begun(run, tmp_path_factory) -> Path:
    """A run that was stopped after three steps."""
    save = tmp_path_factory.mktemp("begun") / "run"
    assert run(save, {2: "stop"}) == 143
    return save


@pytest.mark.parametrize("place", [".metadata", "common.pt", "a part of common.pt", "an object", "a tensor", "an index"])
def test_going_on_runs_nothing_that_a_run_directory_holds(run, begun, whole, tmp_path, place):
    save, canary = tmp_path / "run", tmp_path / "canary"
    shutil.copytree(begun, save, symlinks=True)
    arm(save, place, canary)
    before = {path: path.stat().st_mtime_ns for path in save.rglob("*")}
    if place == "an index":  # of a file that this project makes
        assert run(save) == 0
        same_end(save, whole())
    else:
        with pytest.raises(CheckpointError, match="names '(builtins|__builtin__).eval', which no checkpoint needs"):
            run(save)
        assert {path: path.stat().st_mtime_ns for path in save.rglob("*")} == before
    assert not canary.exists()


@pytest.mark.parametrize("damage", ["cut short", "a position of another", "no step", "no optimizer", "another shape"])
def test_a_damaged_checkpoint_of_a_run_is_named_and_nothing_is_written(run, begun, tmp_path, damage):
    save = tmp_path / "run"
    shutil.copytree(begun, save, symlinks=True)
    folder = save / "iter_0000003"
    if damage == "cut short":
        os.truncate(folder / ".metadata", 500)
    elif damage in ("a position of another", "no step"):
        manifest = json.loads((folder / "megatron_prune.json").read_text())
        manifest["recipe"] = manifest["recipe"][:-1] if damage == "no step" else manifest["recipe"]
        if damage != "no step":
            manifest["recipe"][-1]["iteration"] = 2
        (folder / "megatron_prune.json").write_text(json.dumps(manifest))
    else:
        common = torch.load(folder / "common.pt", weights_only=False)
        common["optimizer"] = {} if damage == "no optimizer" else {"optimizer": {"param_groups": [{"lr": "fast"}]}}
        torch.save(common, folder / "common.pt")
    before = {path: path.stat().st_mtime_ns for path in save.rglob("*")}
    with pytest.raises(CheckpointError, match="iter_0000003"):
        run(save)
    assert {path: path.stat().st_mtime_ns for path in save.rglob("*")} == before


def test_links_in_a_run_directory_are_not_followed(run, begun, whole, tmp_path):
    """Names that a run makes, taken by links out of it: what they lead to stays, and the run comes to the same end."""
    save, outside = tmp_path / "run", tmp_path / "outside"
    shutil.copytree(begun, save, symlinks=True)
    outside.mkdir()
    (outside / "precious").write_text("years of work")
    index = next((save / "data_cache").glob("*train-shuffle_index.npy"))
    index.rename(outside / "index")
    index.symlink_to(outside / "index")
    kept = (outside / "index").read_bytes()
    for name in (".iter_0000004.partial", ".iter_0000002.removed", "iter_0000009"):
        (save / name).symlink_to(outside)
    shutil.copy(save / "iter_0000003/megatron_prune.json", outside)
    for name in ("loss.png", "history.jsonl", "summary.json"):
        text = (save / name).read_bytes() if (save / name).exists() else b""
        (save / name).unlink(missing_ok=True)
        (outside / name).write_bytes(text)
        (save / name).symlink_to(outside / name)
    before = {path: path.read_bytes() for path in outside.iterdir()}
    assert run(save, plots=True) == 0
    assert {path: path.read_bytes() for path in outside.iterdir()} == before and (outside / "index").read_bytes() == kept
    (save / "iter_0000009").unlink()
    (save / "loss.png").unlink()
    same_end(save, whole())


@pytest.mark.parametrize("moment", ["shuffle", "sample", "description"])
def test_a_kill_while_the_indices_are_written_is_mended_by_the_same_command(run, whole, tmp_path, monkeypatch, caplog, moment):
    save, save_array = tmp_path / "run", numpy.save

    def killed(path, *rest, **further):
        if moment in str(path) or moment == "description":
            if moment != "description":
                save_array(path, *rest, **further)
                os.truncate(path, os.path.getsize(path) - 8)
            raise jobs.Killed
        save_array(path, *rest, **further)

    with monkeypatch.context() as patch, pytest.raises(jobs.Killed):
        patch.setattr(numpy, "save", killed)
        run(save)
    assert run(save) == 0
    same_end(save, whole())


def test_a_disk_that_is_full_while_the_indices_are_written_is_named_on_every_rank(options, ranks, run, whole, tmp_path):
    save = tmp_path / "run"
    with pytest.raises(RankFailed, match="the indices of the data cannot be written to .*data_cache") as failed:
        ranks(2).run(jobs.recover, options(save, tensor_model_parallel_size=2), {0: "indices do not fit"})
    assert failed.value.kinds == {0: "PruneError", 1: "PruneError"}
    assert run(save) == 0
    same_end(save, whole())


def test_a_kill_while_a_run_begins_is_mended_by_the_same_command(run, whole, tmp_path):
    save = tmp_path / "run"
    save.mkdir()
    (save / ".run.json.partial").write_text("{")
    assert run(save) == 0
    same_end(save, whole())


def test_a_line_of_the_history_that_is_no_record_is_named_and_one_that_was_cut_off_is_written_again(run, whole, tmp_path):
    save = tmp_path / "run"
    assert run(save, {2: "stop"}) == 143
    lines = (save / "history.jsonl").read_text().splitlines()
    for damaged in ('{"iteration": "3", "tokens": 4}', '{"iteration": 3}', "[]", "{"):
        (save / "history.jsonl").write_text("\n".join([lines[0], damaged, *lines[1:]]) + "\n")
        with pytest.raises(InputError, match="history.jsonl, line 2"):
            run(save)
    (save / "history.jsonl").write_text("\n".join([*lines, lines[-1][:20]]))
    assert run(save) == 0
    same_end(save, whole(), kept=(4, 6))


def test_a_directory_that_holds_something_else_is_left_alone(run, tmp_path):
    save = tmp_path / "run"
    save.mkdir()
    (save / "thesis.tex").write_text("years of work")
    with pytest.raises(InputError, match="run exists"):
        run(save)
    (save / "run.json").write_text("{")
    with pytest.raises(InputError, match="run.json is not JSON"):
        run(save)
    assert (save / "thesis.tex").read_text() == "years of work"


@pytest.mark.parametrize(
    "words, pattern",
    [
        ("--num-layers 7", "--num-layers 7, the checkpoint has 2"),
        ("--rampup-batch-size 2 2 100", "--rampup-batch-size"),
        (
            "--lr-warmup-fraction 0.1 --attention-dropout 0.1",
            "--lr-warmup-fraction 0.1.*--attention-dropout 0.1|dropout.*fraction",
        ),
        ("--context-parallel-size 2", "--context-parallel-size 2"),
        ("--lr fast", "--lr"),
        ("--lr-decay-style sudden", "sudden.*cosine"),
        ("--data-pth x", "--data-pth is no flag"),
    ],
)
def test_the_command_line_refuses_what_it_does_not_follow(home, tmp_path, capsys, words, pattern):
    argv = ["recover", "--load", str(home / "m"), "--save", str(tmp_path / "run"), "--train-iters", "2"]
    argv += ["--data-path", str(home / "text"), "--split", SPLIT, "--seq-length", "18", "--global-batch-size", "2"]
    with pytest.raises(SystemExit) as left:
        main([*argv, *words.split()])
    message = capsys.readouterr().err
    assert left.value.code == 2 and re.search(pattern, message, re.DOTALL) and "Traceback" not in message
    assert not (tmp_path / "run").exists()


# --------------------------------------------------------------------------------------------------- from the command line


def command(options: dict[str, Any]) -> list[str]:
    words = [sys.executable, "-W", "ignore", "-m", "megatron_prune", "recover"]
    for name, value in options.items():
        values = [] if value is True else value if isinstance(value, tuple) else (value,)
        words += [f"--{name.replace('_', '-')}", *map(str, values)]
    return words


def start_and_end(words: list[str], save: Path, iteration: int, number: int) -> tuple[int, str]:
    """Start a run, and send all its processes a signal when an iteration is done → exit code, standard error."""
    process = subprocess.Popen(words, stderr=subprocess.PIPE, text=True, start_new_session=True)
    try:
        file, until = save / "history.jsonl", time.monotonic() + 120
        while not (file.is_file() and f'"iteration": {iteration},' in file.read_text()):
            assert process.poll() is None and time.monotonic() < until, process.communicate()[1]
            time.sleep(0.01)
        os.killpg(process.pid, number)
        _, message = process.communicate(timeout=120)
        return process.returncode, message
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)


def processes_of(group: str) -> list[str]:
    """Command lines that name ``group``."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            line = (folder / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
        except OSError:
            continue
        if group in line:
            found.append(line)
    return found


def test_a_real_run_outlives_a_request_to_stop_and_a_kill(run, options, tmp_path):
    """SIGTERM to every process of the run, as torchrun and Slurm send it; later SIGKILL; the bits stay the same."""
    save, longer = tmp_path / "run", {"train_iters": 400, "save_interval": 5, "keep": 1000, "lr_decay_iters": 400}
    words = command(options(save, **longer))
    code, message = start_and_end(words, save, 6, signal.SIGTERM)
    assert code == 143 and "Traceback" not in message and "Warning" not in message
    stopped = max(int(path.name.removeprefix("iter_")) for path in save.glob("iter_*"))
    assert stopped >= 7 and json.loads((save / "summary.json").read_text())["iterations"] == stopped
    assert "the same command goes on" in message
    code, message = start_and_end(words, save, stopped + 7, signal.SIGKILL)
    assert code == -signal.SIGKILL and f"going on after iteration {stopped}" in message
    until = time.monotonic() + 10
    while left := processes_of(str(save)):
        assert time.monotonic() < until, f"processes outlive the run: {left}"
        time.sleep(0.05)
    end = max(int(path.name.removeprefix("iter_")) for path in save.glob("iter_*")) + 2
    assert run(save, {end: "asked"}, **longer) == 143
    assert run(tmp_path / "whole", {end: "asked"}, **longer) == 143
    assert history(save) == history(tmp_path / "whole")
    same_tensors(save / f"iter_{end:07d}", tmp_path / f"whole/iter_{end:07d}")
