"""Safetensors files from outside: what is not as needed is refused by name."""

from __future__ import annotations

import os
import stat

import pytest
import torch
from safetensors.torch import load_file, save_file

from megatron_prune.errors import InputError
from megatron_prune.files.region import Region
from megatron_prune.files.tensor_file import open_tensors, save_tensors

F64 = torch.float64


@pytest.fixture
def file(tmp_path):
    tensors = {
        "a": torch.tensor([1.0, -2.0], dtype=F64),
        "nan": torch.tensor([float("nan")], dtype=F64),
        "ids": torch.tensor([[3, 4]]),
    }
    save_file(tensors, tmp_path / "f.safetensors", metadata={"format": "x"})
    return tmp_path / "f.safetensors"


def test_what_is_as_needed_is_read(file):
    with open_tensors(file) as held:
        assert (sorted(held.names), held.metadata, held.shape("ids")) == (["a", "ids", "nan"], {"format": "x"}, (1, 2))
        assert held.read("a", F64, (2,)).tolist() == [1.0, -2.0]
        assert held.read("ids", torch.int64, (None, 2), least=3).tolist() == [[3, 4]]
        assert held.read("nan", F64, (1,), finite=False).isnan().all()


@pytest.mark.parametrize("umask", [0o022, 0o077, 0o007])
def test_what_is_written_has_the_mode_of_any_new_file(tmp_path, umask):
    path, wide = tmp_path / "f.safetensors", torch.arange(6.0).view(2, 3).t()
    before = os.umask(umask)
    try:
        save_tensors(path, {"a": wide}, {"format": "x"})
        save_tensors(path, {"a": wide}, {"format": "x"})
    finally:
        os.umask(before)
    assert stat.S_IMODE(path.stat().st_mode) == 0o666 & ~umask
    assert torch.equal(load_file(path)["a"], wide)
    with open_tensors(path) as held:
        assert held.metadata == {"format": "x"}


@pytest.mark.parametrize(
    ("name", "dtype", "shape", "least", "said"),
    [
        ("b", F64, (2,), None, "f.safetensors lacks the tensor 'b'"),
        ("a", F64, (3,), None, r"tensor 'a'\n  got: torch.float64 \[2\]\n  needed: torch.float64 \[3\]"),
        ("a", F64, (2, 1), None, r"tensor 'a'.*\n  needed: torch.float64 \[2, 1\]"),
        ("a", torch.float32, (2,), None, r"needed: torch.float32 \[2\]"),
        ("a", F64, (None,), 0, "tensor 'a'\n  got: -2.0\n  needed: at least 0"),
        ("nan", F64, (1,), None, "tensor 'nan'\n  got: NaN or infinity\n  needed: finite numbers"),
    ],
)
def test_what_is_not_is_refused(file, name, dtype, shape, least, said):
    with open_tensors(file, error=InputError, do="make it again") as held:
        with pytest.raises(InputError, match=f"(?s){said}.*make it again"):
            held.read(name, dtype, shape, least=least)


def test_files_that_are_none(tmp_path, file):
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "cut").write_bytes(file.read_bytes()[:-1])
    (tmp_path / "huge").write_bytes((1 << 63).to_bytes(8, "little") + b"{}")
    (tmp_path / "deep").write_bytes((200_000).to_bytes(8, "little") + b"[" * 200_000)
    for name, said in (
        ("pipe", "a pipe"),
        ("none", "missing"),
        ("cut", "whole"),
        ("huge", "whole"),
        ("deep", "whole"),
        (".", "a directory"),
    ):
        with pytest.raises(InputError, match=said):
            with open_tensors(tmp_path / name):
                pass


def test_a_region_is_written_and_read_in_its_own_size(tmp_path):
    (tmp_path / "w").write_bytes(bytes(64))
    region = Region(tmp_path / "w", 0, 2, 4, torch.float32)
    for wrong in (torch.zeros(5), torch.zeros(9), torch.zeros(8, dtype=F64), torch.zeros(0)):
        for move in (region.write_from, region.read_into):
            with pytest.raises(ValueError, match=r"torch.float32 \[2, 4\]"):
                move(wrong)
    region.write_from(torch.arange(8.0))
    region.read_into(back := torch.empty(8))
    assert back.tolist() == list(range(8))
