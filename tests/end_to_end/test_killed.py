"""A run killed at any moment leaves the complete old output or the complete new one, and the next run mends the rest.

A moment is counted by what a run does with files, not by a clock: on a machine under load the same moments are tried.
"""

from __future__ import annotations

import filecmp
import os
import shutil
import signal
from pathlib import Path

import pytest
import rank_jobs
from ranks import forking_context
from tiny import build_tiny

from megatron_prune.runtime.world import World
from megatron_prune.steps.convert import ConvertOptions, convert
from megatron_prune.steps.export import ExportOptions, export
from megatron_prune.steps.prune import PruneOptions, prune

KILLS = {"convert": 24, "prune": 8, "export": 8}
"""The moments are those of one way to put a directory in its place, which all verbs go: one of them is tried closely."""
LATER = (0.0, 0.0, 0.004)
"""Seconds after a moment, in turns: in the middle of what begins there."""
BIG = {"hidden_size": 384, "intermediate_size": 1536, "num_attention_heads": 12, "head_dim": 32, "vocab_size": 4096}


@pytest.fixture(scope="module")
def context():
    return forking_context()


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """Two Hugging Face models of 50 MB and their Megatron checkpoints."""
    home = tmp_path_factory.mktemp("big")
    for name, seed in (("old", 0), ("new", 1)):
        build_tiny(home / name, "mistral", dtype="float32", seed=seed, **BIG)
        options = {"load": str(home / name), "save": str(home / f"{name}-m"), "target_tensor_parallel_size": 2}
        convert(ConvertOptions(**options), World())
    assert 40e6 < (home / "new/model.safetensors").stat().st_size < 80e6
    return home


def steps(models: Path, verb: str, which: str, out: Path) -> tuple[str, dict]:
    """The run that makes ``which`` at ``out``."""
    if verb == "convert":
        return verb, {"load": str(models / which), "save": str(out), "target_tensor_parallel_size": 3, "overwrite": True}
    if verb == "export":
        return verb, {"load": str(models / f"{which}-m"), "save": str(out), "overwrite": True}
    sizes = {"ffn_hidden_size_remain": 1024, "drop_layers": (2,), "tensor_model_parallel_size": 1, "metric": "magnitude"}
    return verb, {"load": str(models / f"{which}-m"), "save": str(out), "overwrite": True, "ckpt_format": "torch", **sizes}


def kill_at(moment: int, later: float, context, step: tuple[str, dict], place: Path) -> int:
    """SIGKILL when the run does something under ``place`` for that many times; 0 lets it finish → what it did there."""
    seen = context.Value("i", 0)
    process = context.Process(target=rank_jobs.die_at_file_event, args=(World(), moment, later, seen, str(place), step))
    process.start()
    process.join(120)
    assert process.exitcode in ((-signal.SIGKILL, 0) if moment else (0,))  # with fewer moments than that it comes to its end
    return seen.value


def finish(context, step: tuple[str, dict], place: Path) -> int:
    return kill_at(0, 0.0, context, step, place)


def same_tree(left: Path, right: Path) -> bool:
    files = lambda root: sorted(str(path.relative_to(root)) for path in root.rglob("*"))
    names = files(left)
    whole = [name for name in names if (left / name).is_file()]
    return left.is_dir() and names == files(right) and filecmp.cmpfiles(left, right, whole, shallow=False) == (whole, [], [])


@pytest.mark.parametrize("verb", ["convert", "prune", "export"])
@pytest.mark.parametrize("had_output", [True, False])
def test_a_kill_at_any_moment_leaves_the_old_state_or_the_new_one(context, models, tmp_path, verb, had_output):
    out, place = tmp_path / "place/out", tmp_path / "place"
    place.mkdir()
    finish(context, steps(models, verb, "new", out), place)
    shutil.copytree(out, tmp_path / "new")
    moments = finish(context, steps(models, verb, "old", out), place)
    shutil.copytree(out, tmp_path / "old")
    assert not same_tree(tmp_path / "old", tmp_path / "new")
    assert sorted(os.listdir(place)) == ["out"]

    seen = {"old": 0, "new": 0, "partial": 0}
    kills = KILLS[verb]
    for number in range(kills):
        if not had_output:
            shutil.rmtree(out, ignore_errors=True)
        moment, later = 1 + number * moments // (kills - 1), LATER[number % len(LATER)]
        kill_at(moment, later, context, steps(models, verb, "new", out), place)
        seen["partial"] += len(os.listdir(place)) - out.exists()
        if same_tree(out, tmp_path / "old") if had_output else not out.exists():
            seen["old"] += 1
            continue
        assert out.exists(), f"killed at {moment} + {later} s: the old output is gone and the new one is not there"
        assert same_tree(out, tmp_path / "new"), f"killed at {moment} + {later} s: neither the old output nor the new one"
        seen["new"] += 1
        shutil.rmtree(out)
        if had_output:
            shutil.copytree(tmp_path / "old", out)
    assert seen["partial"] >= kills // 2 and seen["old"] >= kills // 2 and seen["new"] >= 1  # they landed in the work

    finish(context, steps(models, verb, "new", out), place)
    assert sorted(os.listdir(place)) == ["out"]
    assert same_tree(out, tmp_path / "new")
    if verb != "export":  # and what all of them were compared with is the right model
        export(ExportOptions(load=str(out), save=str(tmp_path / "hf")), World())
        if verb == "convert":
            assert same_tree(tmp_path / "hf", models / "new")
        else:
            plain = {"load": str(models / "new-m"), "save": str(tmp_path / "plain"), "ckpt_format": "torch_dist"}
            sizes = {"ffn_hidden_size_remain": 1024, "drop_layers": (2,), "tensor_model_parallel_size": 1, "metric": "magnitude"}
            prune(PruneOptions(**plain, **sizes), World())
            export(ExportOptions(load=str(tmp_path / "plain"), save=str(tmp_path / "again/hf")), World())
            assert same_tree(tmp_path / "hf", tmp_path / "again/hf")
    else:
        assert same_tree(out, models / "new")


def test_a_half_written_output_is_not_taken_for_a_checkpoint(context, models, tmp_path):
    from megatron_prune.checkpoint import megatron
    from megatron_prune.errors import CheckpointError
    from megatron_prune.files.staging import partial_path

    out, found = tmp_path / "place/out", 0
    out.parent.mkdir()
    moments = finish(context, steps(models, "convert", "new", out), out.parent)
    shutil.rmtree(out)
    for number in range(1, 9):
        kill_at(moments * number // 10, 0.0, context, steps(models, "convert", "new", out), out.parent)
        partial = partial_path(out)
        if partial.exists() and not out.exists():
            if not list(partial.rglob("megatron_prune.json")):
                found += 1
                with pytest.raises(CheckpointError):
                    megatron.open_checkpoint(partial)
        shutil.rmtree(out, ignore_errors=True)
    assert found >= 3


@pytest.mark.parametrize("rename", [1, 2])
def test_where_directories_cannot_be_exchanged_a_kill_loses_nothing_and_the_next_run_leaves_nothing_behind(
    context, models, tmp_path, rename
):
    out, place = tmp_path / "place/out", tmp_path / "place"
    finish(context, steps(models, "export", "old", out), place)
    shutil.copytree(out, tmp_path / "old")
    process = context.Process(target=rank_jobs.die_at_rename, args=(World(), rename, steps(models, "export", "new", out)))
    process.start()
    process.join(60)
    assert process.exitcode == 9
    assert any(same_tree(path, tmp_path / "old") for path in place.rglob("*"))
    process = context.Process(target=rank_jobs.die_at_rename, args=(World(), 0, steps(models, "export", "new", out)))
    process.start()
    process.join(60)
    assert process.exitcode == 0
    assert sorted(os.listdir(place)) == ["out"]
    assert same_tree(out, models / "new")
