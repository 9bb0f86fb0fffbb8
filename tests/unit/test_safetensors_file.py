"""Safetensors files laid out by us are those that safetensors itself writes."""

from __future__ import annotations

import json

import pytest
import torch
from dense import bits
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from megatron_prune.checkpoint import safetensors_file
from megatron_prune.errors import CheckpointError
from megatron_prune.files.region import close_files

NAMES = st.one_of(
    st.text(st.characters(codec="utf-8"), min_size=1, max_size=12),
    st.sampled_from(
        [
            "model.layers.0.mlp.up_proj.weight",
            "model.layers.10.w",
            "ä.Ω.漢字",
            "😀",
            '"quoted"',
            "back\\slash",
            "\x00\x1f\x7f",
            "\u2028",
            " ",
        ]
    ),
).filter(lambda name: name != "__metadata__")
DTYPES = st.sampled_from([torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.int64, torch.int8, torch.bool])
SHAPES = st.lists(st.integers(0, 5), max_size=3).map(tuple)


@given(st.dictionaries(NAMES, st.tuples(DTYPES, SHAPES), min_size=1, max_size=8), st.integers(0, 2**31))
def test_a_file_laid_out_and_filled_in_is_byte_for_byte_what_save_file_writes(tmp_path_factory, tensors, seed):
    folder = tmp_path_factory.mktemp("s")
    generator = torch.Generator().manual_seed(seed)
    data = {name: torch.randn(shape, generator=generator).to(dtype) for name, (dtype, shape) in tensors.items()}
    save_file(data, folder / "theirs", metadata={"format": "pt"})
    safetensors_file.lay_out(folder / "ours", tensors)
    for name, (region, shape) in safetensors_file.read_header(folder / "ours").items():
        assert shape == tensors[name][1] and region.dtype == tensors[name][0]
        if data[name].numel():
            region.write_from(data[name].contiguous())
    close_files()
    assert (folder / "ours").read_bytes() == (folder / "theirs").read_bytes()


@given(st.dictionaries(NAMES, st.tuples(DTYPES, st.lists(st.integers(1, 5), min_size=1, max_size=2)), min_size=1, max_size=6))
def test_the_regions_of_a_file_of_safetensors_hold_the_values_that_were_saved(tmp_path_factory, tensors):
    path = tmp_path_factory.mktemp("s") / "theirs"
    data = {name: torch.randn(shape).to(dtype) for name, (dtype, shape) in tensors.items()}
    save_file(data, path)
    found = safetensors_file.read_header(path)
    assert found.keys() == data.keys()
    for name, (region, shape) in found.items():
        out = torch.empty(shape, dtype=region.dtype)
        region.read_into(out)
        assert torch.equal(bits(out), bits(data[name]))


def test_a_fresh_file_is_zero_and_takes_no_room_on_disk(tmp_path):
    safetensors_file.lay_out(tmp_path / "f", {"w": (torch.float32, (1 << 20, 8))})
    assert (tmp_path / "f").stat().st_size > 32 << 20
    assert (tmp_path / "f").stat().st_blocks * 512 < 1 << 20
    assert not load_file(tmp_path / "f")["w"].any()


def saved(path) -> bytes:
    save_file({"a": torch.ones(6, 4), "b": torch.ones(3)}, path)
    return path.read_bytes()


@pytest.mark.parametrize("keep", [0, 3, 8, 20, -100, -1])
def test_a_truncated_file_is_refused(tmp_path, keep):
    whole = saved(tmp_path / "f")
    (tmp_path / "f").write_bytes(whole[:keep])
    with pytest.raises(CheckpointError, match="not a whole safetensors file"):
        safetensors_file.read_header(tmp_path / "f")


def rewritten(path, change) -> None:
    """The file with another header over the same data."""
    whole = saved(path)
    length = int.from_bytes(whole[:8], "little")
    header = json.loads(whole[8 : 8 + length])
    change(header)
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + whole[8 + length :])


@pytest.mark.parametrize(
    "change",
    [
        lambda header: header["a"].update(data_offsets=[0, 4]),
        lambda header: header["a"].update(data_offsets=[-8, 88]),
        lambda header: header["b"].update(data_offsets=[0, 12]),
        lambda header: header["b"].update(shape=[4]),
        lambda header: header.pop("b"),
    ],
)
def test_a_header_that_does_not_fit_the_data_is_refused(tmp_path, change):
    rewritten(tmp_path / "f", change)
    with pytest.raises(CheckpointError):
        safetensors_file.read_header(tmp_path / "f")


def test_a_tensor_of_an_unknown_type_is_refused_by_name(tmp_path):
    header = b'{"model.position":{"dtype":"F8_E8M0","shape":[4],"data_offsets":[0,4]}}'
    (tmp_path / "f").write_bytes(len(header).to_bytes(8, "little") + header + bytes(4))
    with pytest.raises(CheckpointError, match="model.position"):
        safetensors_file.read_header(tmp_path / "f")


def test_a_missing_file_is_refused(tmp_path):
    with pytest.raises(CheckpointError):
        safetensors_file.read_header(tmp_path / "none")
