"""Which files of a directory of indices are used, which made again, and which are nobody's business."""

from __future__ import annotations

import fcntl
import os
from pathlib import Path

import numpy
import pytest
from recovery_reference import documents, write_pair

from megatron_prune.errors import InputError
from megatron_prune.recovery import index_cache
from megatron_prune.recovery.data import DataOptions, build_alone

COUNTS = (8, 4, 4)


@pytest.fixture
def options(tmp_path) -> DataOptions:
    pair = write_pair(tmp_path / "text", documents(30))
    return DataOptions(data_path=(pair,), split="60,30,10", seq_length=16, seed=5, cache=tmp_path / "cache", shared=True)


def samples(options: DataOptions) -> list[list[int]]:
    train, _, _ = build_alone(options, COUNTS)
    return [train[number]["tokens"].tolist() for number in range(len(train))]


def damage(path: Path, what: str) -> None:
    data = path.read_bytes()
    if what == "cut":
        path.write_bytes(data[:-1])
    elif what == "longer":
        path.write_bytes(data + b"1")
    elif what == "empty":
        path.write_bytes(b"")
    elif what == "zeros":
        path.write_bytes(bytes(len(data)))
    elif what == "header cut":
        path.write_bytes(data[:40])
    elif what == "another shape":
        path.write_bytes(data.replace(b"'shape': (", b"'shape': (9"))
    elif what == "objects":
        numpy.save(path, numpy.array([{}, []], dtype=object), allow_pickle=True)
    elif what == "another type":
        numpy.save(path, numpy.load(path).astype(numpy.float64))
    elif what == "version 2":
        with open(path, "wb") as file:
            numpy.lib.format.write_array(file, numpy.arange(4, dtype=numpy.int32), version=(2, 0))
    elif what == "a link":
        path.rename(path.with_name("elsewhere"))
        path.symlink_to("elsewhere")
    elif what == "a pipe":
        path.unlink()
        os.mkfifo(path)


DAMAGES = "cut,longer,empty,zeros,header cut,another shape,objects,another type,version 2,a link,a pipe".split(",")


@pytest.mark.parametrize("what", DAMAGES)
@pytest.mark.parametrize("index", ["document", "sample", "shuffle"])
def test_what_is_not_whole_is_made_again_and_says_so(options, monkeypatch, what, index):
    wanted = samples(options)
    path = next(options.cache.glob(f"*GPTDataset-train-{index}_index.npy"))
    before = path.read_bytes()
    damage(path, what)
    said = []
    monkeypatch.setattr(index_cache.log, "warning", lambda _, which, why: said.append(which))
    assert samples(options) == wanted
    assert said == [path]
    assert path.read_bytes() == before and not path.is_symlink()


def test_what_is_whole_is_used_where_runs_share_it_and_made_again_where_they_do_not(options):
    samples(options)
    paths = {path: path.stat().st_ino for path in options.cache.iterdir()}
    samples(options)
    assert {path: path.stat().st_ino for path in options.cache.iterdir()} == paths
    wrong = next(options.cache.glob("*GPTDataset-train-shuffle_index.npy"))
    numpy.save(wrong, numpy.load(wrong)[::-1].copy())  # whole, and not what this project wrote
    unshared = DataOptions(**{**vars(options), "shared": False})
    assert samples(unshared) == samples(DataOptions(**{**vars(options), "cache": options.cache.with_name("other")}))


def test_files_of_other_names_are_left_alone_and_places_that_will_not_do_are_refused(options, tmp_path):
    samples(options)
    other = options.cache / "thesis.npy"
    other.write_bytes(b"years of work")
    samples(DataOptions(**{**vars(options), "shared": False}))
    assert other.read_bytes() == b"years of work"
    index_cache.check_place(options.cache)
    index_cache.check_place(tmp_path / "free")
    (tmp_path / "link").symlink_to(options.cache)
    for place in (tmp_path / "link", other):
        with pytest.raises(InputError, match="a link or a file"):
            index_cache.check_place(place)
    path = next(options.cache.glob("*sample_index.npy"))
    path.unlink()
    path.mkdir()
    with pytest.raises(InputError, match="(?s)sample_index.npy.*a directory"):
        index_cache.check_place(options.cache)


def test_runs_that_share_a_directory_make_its_indices_one_after_the_other(tmp_path):
    with index_cache.held(tmp_path / "cache", shared=True):
        number = os.open(tmp_path / "cache", os.O_RDONLY)
        with pytest.raises(BlockingIOError):
            fcntl.flock(number, fcntl.LOCK_EX | fcntl.LOCK_NB)
    fcntl.flock(number, fcntl.LOCK_EX | fcntl.LOCK_NB)
    os.close(number)
