"""A run killed at any moment leaves the complete old output or the complete new one, and the next run mends the rest.

Runs are forked from a process that has imported everything, so that a kill lands in the work and not in the imports.
"""

from __future__ import annotations

import filecmp
import multiprocessing
import os
import random
import shutil
import time
from pathlib import Path

import pytest
import rank_jobs
from tiny import build_tiny

from megatron_prune.runtime.world import World
from megatron_prune.steps.convert import ConvertOptions, convert
from megatron_prune.steps.export import ExportOptions, export
from megatron_prune.steps.prune import PruneOptions, prune

KILLS = 24
BIG = {"hidden_size": 384, "intermediate_size": 1536, "num_attention_heads": 12, "head_dim": 32, "vocab_size": 4096}


@pytest.fixture(scope="module")
def context():
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["rank_jobs", *(f"megatron_prune.steps.{step}" for step in ("convert", "export", "prune"))])
    return context


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """Two Hugging Face models of 50 MB and their Megatron checkpoints."""
    home = tmp_path_factory.mktemp("big")
    for name, seed in (("old", 0), ("new", 1)):
        build_tiny(home / name, "mistral", dtype="float32", seed=seed, **BIG)
        options = {"load_dir": str(home / name), "save_dir": str(home / f"{name}-m"), "target_tensor_parallel_size": 2}
        convert(ConvertOptions(**options), World())
    assert 40e6 < (home / "new/model.safetensors").stat().st_size < 80e6
    return home


def steps(models: Path, verb: str, which: str, out: Path) -> tuple[str, dict]:
    """The run that makes ``which`` at ``out``."""
    if verb == "convert":
        return verb, {"load_dir": str(models / which), "save_dir": str(out), "target_tensor_parallel_size": 3, "overwrite": True}
    if verb == "export":
        return verb, {"load_dir": str(models / f"{which}-m"), "save_dir": str(out), "overwrite": True}
    sizes = {"ffn_hidden_size_remain": 1024, "drop_layers": (2,), "tensor_model_parallel_size": 1, "metric": "magnitude"}
    return verb, {"load": str(models / f"{which}-m"), "save": str(out), "overwrite": True, "ckpt_format": "torch", **sizes}


def start(context, step: tuple[str, dict]):
    process = context.Process(target=rank_jobs.run_steps, args=(World(), step))
    process.start()
    return process


def kill_after(delay: float, context, step: tuple[str, dict]) -> None:
    """SIGKILL, unless the run is over by then."""
    process = start(context, step)
    time.sleep(delay)
    process.kill()
    process.join()


def finish(context, step: tuple[str, dict]) -> float:
    begin = time.monotonic()
    process = start(context, step)
    process.join(60)
    assert process.exitcode == 0
    return time.monotonic() - begin


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
    finish(context, steps(models, verb, "new", out))
    shutil.copytree(out, tmp_path / "new")
    seconds = finish(context, steps(models, verb, "old", out))
    shutil.copytree(out, tmp_path / "old")
    assert not same_tree(tmp_path / "old", tmp_path / "new")
    assert sorted(os.listdir(place)) == ["out"]

    rng, seen = random.Random(f"{verb} {had_output}"), {"old": 0, "new": 0, "partial": 0}
    # evenly spread over a whole run and a little beyond, so that the moments of the last rename and clean-up are among them
    delays = [seconds * 1.15 * (number + rng.random()) / KILLS for number in range(KILLS)]
    for delay in delays:
        if not had_output:
            shutil.rmtree(out, ignore_errors=True)
        kill_after(delay, context, steps(models, verb, "new", out))
        seen["partial"] += len(os.listdir(place)) - out.exists()
        if same_tree(out, tmp_path / "old") if had_output else not out.exists():
            seen["old"] += 1
            continue
        assert out.exists(), f"killed after {delay:.3f} s: the old output is gone and the new one is not there"
        assert same_tree(out, tmp_path / "new"), f"killed after {delay:.3f} s: neither the old output nor the new one"
        seen["new"] += 1
        shutil.rmtree(out)
        if had_output:
            shutil.copytree(tmp_path / "old", out)
    assert seen["partial"] >= 2 and seen["old"] >= 2  # kills did land in the middle of the work

    finish(context, steps(models, verb, "new", out))
    assert sorted(os.listdir(place)) == ["out"]
    assert same_tree(out, tmp_path / "new")
    if verb != "export":  # and what all of them were compared with is the right model
        export(ExportOptions(load_dir=str(out), save_dir=str(tmp_path / "hf")), World())
        if verb == "convert":
            assert same_tree(tmp_path / "hf", models / "new")
        else:
            plain = {"load": str(models / "new-m"), "save": str(tmp_path / "plain"), "ckpt_format": "torch_dist"}
            sizes = {"ffn_hidden_size_remain": 1024, "drop_layers": (2,), "tensor_model_parallel_size": 1, "metric": "magnitude"}
            prune(PruneOptions(**plain, **sizes), World())
            export(ExportOptions(load_dir=str(tmp_path / "plain"), save_dir=str(tmp_path / "again/hf")), World())
            assert same_tree(tmp_path / "hf", tmp_path / "again/hf")
    else:
        assert same_tree(out, models / "new")


def test_a_half_written_output_is_not_taken_for_a_checkpoint(context, models, tmp_path):
    from megatron_prune.checkpoint import megatron
    from megatron_prune.checkpoint.staging import partial_path
    from megatron_prune.errors import CheckpointError

    out, found = tmp_path / "out", 0
    finish(context, steps(models, "convert", "new", out))
    seconds = finish(context, steps(models, "convert", "new", out))
    shutil.rmtree(out)
    for number in range(10):
        kill_after(seconds * (number + 2) / 16, context, steps(models, "convert", "new", out))
        partial = partial_path(out)
        if partial.exists() and not out.exists():
            if not list(partial.rglob("megatron_prune.json")):
                found += 1
                with pytest.raises(CheckpointError):
                    megatron.open_checkpoint(partial)
        shutil.rmtree(out, ignore_errors=True)
    assert found


@pytest.mark.parametrize("rename", [1, 2])
def test_where_directories_cannot_be_exchanged_a_kill_loses_nothing_and_the_next_run_leaves_nothing_behind(
    context, models, tmp_path, rename
):
    out, place = tmp_path / "place/out", tmp_path / "place"
    finish(context, steps(models, "export", "old", out))
    shutil.copytree(out, tmp_path / "old")
    process = context.Process(target=rank_jobs.die_at_rename, args=(World(), rename, steps(models, "export", "new", out)))
    process.start()
    process.join(60)
    assert process.exitcode == 9
    assert any(same_tree(place / name, tmp_path / "old") for name in os.listdir(place))
    process = context.Process(target=rank_jobs.die_at_rename, args=(World(), 0, steps(models, "export", "new", out)))
    process.start()
    process.join(60)
    assert process.exitcode == 0
    assert sorted(os.listdir(place)) == ["out"]
    assert same_tree(out, models / "new")
