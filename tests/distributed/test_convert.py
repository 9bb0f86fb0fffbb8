"""Conversions by several processes write the same bytes as one process does."""

from __future__ import annotations

import filecmp
import json

import pytest
import rank_jobs

FORMATS = ["torch_dist", "torch"]


def same_files(left, right) -> bool:
    """Same names and bytes in both trees."""
    names = sorted(str(path.relative_to(left)) for path in left.rglob("*") if path.is_file())
    assert names == sorted(str(path.relative_to(right)) for path in right.rglob("*") if path.is_file())
    return filecmp.cmpfiles(left, right, names, shallow=False)[1:] == ([], [])


def steps(source, ckpt_format: str, folder) -> list[tuple[str, dict]]:
    """Into a checkpoint ``m``, to other ranks in ``t``, and ``back``."""
    parallel = {"target_tensor_parallel_size": 3, "target_pipeline_parallel_size": 2, "ckpt_format": ckpt_format}
    return [
        ("convert", {"load": str(source), "save": str(folder / "m"), **parallel}),
        ("transfer", {"load": str(folder / "m"), "save": str(folder / "t"), "target_tensor_parallel_size": 2}),
        ("export", {"load": str(folder / "t"), "save": str(folder / "back")}),
    ]


@pytest.fixture(scope="module")
def alone(ranks, tmp_path_factory):
    """``alone(source, format)`` → what one process makes, once."""
    made = {}

    def get(source, ckpt_format: str):
        key = (source, ckpt_format)
        if key not in made:
            made[key] = tmp_path_factory.mktemp("one") / "out"
            ranks(1).run(rank_jobs.run_steps, *steps(source, ckpt_format, made[key]))
        return made[key]

    return get


@pytest.mark.parametrize("size", [2, 3, 4])
@pytest.mark.parametrize("ckpt_format", FORMATS)
def test_any_number_of_processes_writes_what_one_writes(ranks, tiny, alone, family, tmp_path, size, ckpt_format):
    source = tiny(family)
    one, many = alone(source, ckpt_format), tmp_path / "many"
    ranks(size).run(rank_jobs.run_steps, *steps(source, ckpt_format, many))
    assert same_files(one / "back", many / "back") and same_files(source, many / "back")
    assert manifest(one / "m") == manifest(many / "m")


def manifest(checkpoint) -> dict:
    """What a manifest says, but for the file that names the tokenizer by its place."""
    said = json.loads((checkpoint / "release/megatron_prune.json").read_text())
    said["files"].pop("common.pt", None)
    return said
