"""``torch.save`` archives: their tensors are found, and nothing in them is ever executed."""

from __future__ import annotations

import argparse
import collections
import functools
import io
import os
import pickle
import signal
import types
import zipfile
from pathlib import Path

import pytest
import torch
from dense import bits
from hypothesis import given
from hypothesis import strategies as st

from megatron_prune.checkpoint import torch_archive
from megatron_prune.errors import CheckpointError
from megatron_prune.files.pickled import Inert
from megatron_prune.files.region import close_files

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def values(tensor: torch.Tensor, path: Path) -> torch.Tensor:
    """A meta tensor's values, read through its region."""
    region = torch_archive.region_of(tensor, path)
    out = torch.empty(tensor.shape, dtype=region.dtype)
    if out.numel():
        region.read_into(out)
    close_files()
    return out


@given(st.lists(st.tuples(st.sampled_from(DTYPES), st.lists(st.integers(0, 5), min_size=1, max_size=3)), min_size=1, max_size=5))
def test_the_regions_of_a_saved_file_hold_the_values_that_torch_saved(tmp_path_factory, specs):
    path = tmp_path_factory.mktemp("a") / "f.pt"
    data = {str(n): torch.randn(shape).to(dtype) for n, (dtype, shape) in enumerate(specs)}
    torch.save({"model": data, "args": argparse.Namespace(a=1)}, path)
    read = torch_archive.read_objects(path)
    assert read["args"].a == 1
    for name, tensor in read["model"].items():
        assert tensor.is_meta and tensor.shape == data[name].shape
        assert torch.equal(bits(values(tensor, path)), bits(data[name]))


@given(st.lists(st.tuples(st.sampled_from(DTYPES), st.lists(st.integers(1, 5), min_size=1, max_size=3)), min_size=1, max_size=5))
def test_an_archive_laid_out_and_filled_in_is_what_torch_load_reads(tmp_path_factory, specs):
    path = tmp_path_factory.mktemp("a") / "f.pt"
    data = [torch.randn(shape).to(dtype) for dtype, shape in specs]
    with open(path, "wb") as file:
        file.write(b"before")
        length = torch_archive.lay_out([torch_archive.empty_tensor(tuple(t.shape), t.dtype) for t in data], file)
        file.write(b"after")
    assert path.stat().st_size == 6 + length + 5
    for found, tensor in zip(torch_archive.read_objects(path, offset=6, length=length), data):
        torch_archive.region_of(found, path).write_from(tensor)
    close_files()
    for found, tensor in zip(torch.load(io.BytesIO(path.read_bytes()[6:-5])), data):
        assert torch.equal(bits(found), bits(tensor))


def test_a_view_of_a_larger_storage_is_read_at_its_own_place(tmp_path):
    whole = torch.randn(6, 4)
    torch.save({"rows": whole[2:5]}, tmp_path / "f.pt")
    assert torch.equal(values(torch_archive.read_objects(tmp_path / "f.pt")["rows"], tmp_path / "f.pt"), whole[2:5])


def test_a_tensor_that_is_not_stored_row_by_row_is_refused(tmp_path):
    torch.save({"w": torch.randn(3, 4).t()}, tmp_path / "f.pt")
    with pytest.raises(CheckpointError, match="row by row"):
        torch_archive.region_of(torch_archive.read_objects(tmp_path / "f.pt")["w"], tmp_path / "f.pt")


def test_the_values_that_megatrons_args_hold_are_read(tmp_path):
    args = argparse.Namespace(
        dtype=torch.bfloat16,
        path=Path("/x/y"),
        signal=signal.SIGTERM,
        nested=types.SimpleNamespace(a=[1, (2, 3)], b={"c": None}),
        order=collections.OrderedDict(a=1),
    )
    torch.save(args, tmp_path / "f.pt")
    assert torch_archive.read_objects(tmp_path / "f.pt") == args


# ------------------------------------------------------------------------------------------------ what is not executed


class Bomb:
    """Unpickles by calling a function with arguments of the attacker's choice."""

    def __init__(self, function, *arguments):
        self.call = (function, arguments)

    def __reduce__(self):
        return self.call


def bombs(marker: Path) -> dict[str, Bomb]:
    """Ways to create ``marker`` by being read."""
    return {
        "os.system": Bomb(os.system, f"touch {marker}"),
        "eval": Bomb(eval, f"open({str(marker)!r}, 'w').close()"),
        "open": Bomb(open, str(marker), "w"),
        "Path.touch": Bomb(Path.touch, marker),
        "partial": Bomb(functools.partial(os.system, f"touch {marker}")),
        "getattr": Bomb(getattr, Bomb(__import__, "os"), "system"),
        "torch.load": Bomb(torch.load, str(marker)),
    }


HELD = ["Path.touch", "torch.load"]
KINDS = [kind for kind in bombs(Path("x")) if kind not in HELD]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("wrap", [lambda bomb: bomb, lambda bomb: {"args": argparse.Namespace(x=bomb), "model": {}}])
def test_a_pickle_that_calls_something_is_refused_and_not_executed(tmp_path, kind, wrap):
    marker = tmp_path / "executed"
    torch.save(wrap(bombs(marker)[kind]), tmp_path / "f.pt")
    with pytest.raises(CheckpointError, match="names '.*', which no checkpoint needs"):
        torch_archive.read_objects(tmp_path / "f.pt")
    assert not marker.exists()


@pytest.mark.parametrize("kind", HELD)
def test_a_call_that_data_may_hold_is_held_and_not_made(tmp_path, kind):
    torch.save({"args": bombs(tmp_path / "executed")[kind]}, tmp_path / "f.pt")
    assert isinstance(torch_archive.read_objects(tmp_path / "f.pt")["args"], Inert)
    assert not (tmp_path / "executed").exists()


def test_the_bomb_of_these_tests_does_go_off_where_it_is_trusted(tmp_path):
    torch.save(bombs(tmp_path / "executed")["os.system"], tmp_path / "f.pt")
    torch.load(tmp_path / "f.pt", weights_only=False)
    assert (tmp_path / "executed").exists()


def test_a_plain_pickle_that_is_no_archive_is_refused_and_not_executed(tmp_path):
    marker = tmp_path / "executed"
    (tmp_path / "f.pt").write_bytes(pickle.dumps(bombs(marker)["os.system"]))
    with pytest.raises(CheckpointError):
        torch_archive.read_objects(tmp_path / "f.pt")
    assert not marker.exists()


def test_an_old_archive_without_zip_is_refused_when_its_tensors_are_asked_for(tmp_path):
    torch.save({"w": torch.ones(3)}, tmp_path / "f.pt", _use_new_zipfile_serialization=False)
    with pytest.raises(CheckpointError, match="torch before 1.6"):
        torch_archive.read_objects(tmp_path / "f.pt")


@pytest.mark.parametrize("keep", [0, 1, 4, 100, -200, -1])
def test_a_truncated_archive_is_refused(tmp_path, keep):
    torch.save({"w": torch.ones(300)}, tmp_path / "f.pt")
    (tmp_path / "f.pt").write_bytes((tmp_path / "f.pt").read_bytes()[:keep])
    with pytest.raises(CheckpointError):
        torch_archive.read_objects(tmp_path / "f.pt")


CRAFTED = {
    "a call with wrong arguments": b"\x80\x02cargparse\nNamespace\n(K\x01tR.",
    "an empty stack": b"\x80\x02R.",
    "a missing memo": b"\x80\x02h\x63.",
    "a tensor of no storage": b"\x80\x02ctorch._utils\n_rebuild_tensor_v2\n(NK\x00)))NtR.",
    "a storage of an unknown type": b"\x80\x02(X\x07\x00\x00\x00storageNX\x01\x00\x00\x000X\x03\x00\x00\x00cpuK\x01tQ.",
    "items of no dictionary": b"\x80\x02]K\x01K\x02s.",
    "a state of no object": b"\x80\x02K\x01K\x02b.",
}


@pytest.mark.parametrize("name", CRAFTED)
def test_a_whole_archive_around_a_damaged_pickle_is_refused_and_does_not_crash(tmp_path, name):
    torch.save({"w": torch.ones(3)}, tmp_path / "good.pt")
    with zipfile.ZipFile(tmp_path / "good.pt") as good, zipfile.ZipFile(tmp_path / "f.pt", "w") as bad:
        for entry in good.namelist():
            bad.writestr(entry, CRAFTED[name] if entry.endswith("data.pkl") else good.read(entry))
    with pytest.raises(CheckpointError):
        torch_archive.read_objects(tmp_path / "f.pt")
