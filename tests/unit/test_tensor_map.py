"""Maps accept exact covers only, and read and write what their tiles say."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from dense import SMALL, assert_same_model, random_model, raw_map, read_all
from hypothesis import given
from hypothesis import strategies as st

from megatron_prune.arch.sharding import Patch
from megatron_prune.arch.tensors import TensorId
from megatron_prune.checkpoint import digests
from megatron_prune.checkpoint.tensor_map import DamagedTensor, TensorMap, Tile
from megatron_prune.errors import CheckpointError
from megatron_prune.files.region import Region, Scratch, close_files

ROWS, COLS = SMALL.ffn_hidden_size, SMALL.hidden_size
TENSOR = TensorId("gate", 1)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    return raw_map(tmp_path_factory.mktemp("map") / "bytes", SMALL, random_model(SMALL))


def with_tiles(whole, tiles):
    """The map with ``(row, col, rows, cols)`` as the tiles of one tensor."""
    changed = TensorMap(SMALL)
    changed.tiles.update({t: list(parts) for t, parts in whole.tiles.items()})
    region = whole.tiles[TENSOR][0].region
    changed.tiles[TENSOR] = [Tile(Region(region.path, 0, rows, cols, torch.float32), row, col) for row, col, rows, cols in tiles]
    return changed


@st.composite
def covers(draw):
    """Rectangles that cover ROWS × COLS once: bands of columns, each cut into rows in its own way, in any order."""
    cuts = lambda size: [0, *sorted(draw(st.sets(st.integers(1, size - 1), max_size=4))), size]
    columns, tiles = cuts(COLS), []
    for left, right in zip(columns, columns[1:]):
        rows = cuts(ROWS)
        tiles += [(top, left, bottom - top, right - left) for top, bottom in zip(rows, rows[1:])]
    return draw(st.permutations(tiles))


@given(covers())
def test_an_exact_cover_is_accepted(whole, tiles):
    with_tiles(whole, tiles).validate("here")


@given(covers(), st.data())
def test_a_cover_with_a_gap_is_refused(whole, tiles, data):
    tiles.pop(data.draw(st.integers(0, len(tiles) - 1)))
    with pytest.raises(CheckpointError, match="layer 1 gate"):
        with_tiles(whole, tiles).validate("here")


@given(covers(), st.data())
def test_a_part_that_comes_twice_is_refused(whole, tiles, data):
    tiles.append(tiles[data.draw(st.integers(0, len(tiles) - 1))])
    with pytest.raises(CheckpointError, match="layer 1 gate"):
        with_tiles(whole, tiles).validate("here")


@given(covers(), st.data(), st.integers(-3, 3), st.integers(-3, 3))
def test_a_part_in_another_place_of_the_same_size_is_refused(whole, tiles, data, down, right):
    number = data.draw(st.integers(0, len(tiles) - 1))
    row, col, rows, cols = tiles[number]
    tiles[number] = (row + down, col + right, rows, cols)
    if (down, right) == (0, 0):
        with_tiles(whole, tiles).validate("here")
    else:
        with pytest.raises(CheckpointError, match="cover"):
            with_tiles(whole, tiles).validate("here")


@given(
    st.lists(
        st.tuples(st.integers(0, ROWS - 1), st.integers(0, COLS - 1), st.integers(1, ROWS), st.integers(1, COLS)),
        min_size=1,
        max_size=4,
    )
)
def test_whatever_is_accepted_covers_every_element_once(whole, tiles):
    seen = torch.zeros(ROWS * 2, COLS * 2, dtype=torch.long)
    for row, col, rows, cols in tiles:
        seen[row : row + rows, col : col + cols] += 1
    exact = bool((seen[:ROWS, :COLS] == 1).all()) and seen.sum() == ROWS * COLS
    try:
        with_tiles(whole, tiles).validate("here")
    except CheckpointError:
        return
    assert exact


def test_two_halves_that_overlap_while_a_quarter_is_missing_are_refused(whole):
    half = COLS // 2
    with pytest.raises(CheckpointError, match="cover"):
        with_tiles(whole, [(0, 0, ROWS, half), (0, half - 1, ROWS, half)]).validate("here")


def test_parts_of_mixed_dtype_are_refused(whole):
    changed = with_tiles(whole, [(0, 0, 4, COLS), (4, 0, ROWS - 4, COLS)])
    second = changed.tiles[TENSOR][1]
    changed.tiles[TENSOR][1] = second._replace(region=dataclasses.replace(second.region, dtype=torch.bfloat16))
    with pytest.raises(CheckpointError, match="layer 1 gate: parts of different dtype"):
        changed.validate("here")


def test_every_missing_and_every_foreign_tensor_is_named(whole):
    changed = with_tiles(whole, [(0, 0, ROWS, COLS)])
    del changed.tiles[TensorId("final_norm")], changed.tiles[TensorId("down", 3)]
    changed.tiles[TensorId("down", 4)] = [Tile(whole.tiles[TENSOR][0].region, 0, 0)]
    with pytest.raises(CheckpointError) as error:
        changed.validate("here")
    for line in ("final_norm: missing", "layer 3 down: missing", "layer 4 down: not a tensor of this model"):
        assert line in str(error.value)


@given(covers(), st.data())
def test_reading_through_any_cover_gives_the_dense_tensor_and_every_rectangle_of_it(tmp_path_factory, tiles, data):
    path = tmp_path_factory.mktemp("map") / "bytes"
    model = random_model(SMALL, torch.bfloat16)
    tensors = raw_map(path, SMALL, model)
    pieces, offset = [], path.stat().st_size
    with open(path, "ab") as file:
        for row, col, rows, cols in tiles:
            part = model[TENSOR][row : row + rows, col : col + cols].contiguous()
            pieces.append(Tile(Region(path, offset, rows, cols, torch.bfloat16), row, col))
            offset += file.write(part.view(-1).view(torch.uint8).numpy().tobytes())
    tensors.tiles[TENSOR] = pieces
    try:
        assert torch.equal(tensors.read(TENSOR, Scratch()), model[TENSOR])
        top, left = data.draw(st.integers(0, ROWS - 1)), data.draw(st.integers(0, COLS - 1))
        rows, cols = range(top, data.draw(st.integers(top, ROWS))), range(left, data.draw(st.integers(left, COLS)))
        expected = model[TENSOR][rows.start : rows.stop, cols.start : cols.stop]
        assert torch.equal(tensors.read_block(TENSOR, rows, cols), expected)
    finally:
        close_files()


@given(covers())
def test_writing_through_any_cover_fills_tiles_and_copies_in_their_own_dtype(tmp_path_factory, tiles):
    path = tmp_path_factory.mktemp("map") / "bytes"
    tensors = raw_map(path, SMALL, random_model(SMALL))
    start = path.stat().st_size
    place = lambda row, col, rows, cols: Patch("gate", 0, row, col, rows, cols)
    tensors.tiles[TENSOR], offset = [], start
    for row, col, rows, cols in tiles:
        tensors.add(1, Region(path, offset, rows, cols, torch.float16), [place(row, col, rows, cols)])
        offset += rows * cols * 2
    tensors.add(1, Region(path, offset, ROWS, COLS, torch.float16), [place(0, 0, ROWS, COLS)], replica=True)
    with open(path, "ab") as file:
        file.truncate(offset + ROWS * COLS * 2)
    data = torch.randn(ROWS, COLS)
    try:
        tensors.write(TENSOR, data, Scratch())
        assert torch.equal(tensors.read(TENSOR, Scratch()), data.half())
        copy = torch.empty(ROWS, COLS, dtype=torch.float16)
        tensors.replicas[TENSOR][0].region.read_into(copy)
        assert torch.equal(copy, data.half())
    finally:
        close_files()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_every_tensor_and_vector_reads_back_in_every_dtype(tmp_path, dtype):
    model = random_model(SMALL, dtype)
    tensors = raw_map(tmp_path / "bytes", SMALL, model)
    assert_same_model(read_all(tensors), model)
    assert_same_model({t: tensors.read(t, Scratch()) for t in model}, model)
    assert all(tensors.nbytes(t) == data.numel() * dtype.itemsize for t, data in model.items())


def test_a_file_that_ends_early_is_refused_when_read(tmp_path):
    model = random_model(SMALL)
    tensors = raw_map(tmp_path / "bytes", SMALL, model)
    last = list(model)[-1]
    with open(tmp_path / "bytes", "ab") as file:
        file.truncate((tmp_path / "bytes").stat().st_size - 1)
    with pytest.raises(CheckpointError, match="ends early"):
        tensors.read(last, Scratch())


# ---------------------------------------------------------------------------------------------------------------- digests


def with_digests(whole, tiles, monkeypatch):
    """The map of :func:`with_tiles` with the digests of its bytes, a stretch being a few rows."""
    monkeypatch.setattr(digests, "STRETCH_BYTES", 3 * COLS * 4)
    changed = with_tiles(whole, tiles)
    for tensor in whole.tiles:
        changed.expected[tensor] = changed.read_digested(tensor, Scratch())[1]
    return changed


@given(covers(), st.data())
def test_rows_of_a_tensor_are_read_as_they_are_and_compared(whole, tiles, data):
    with pytest.MonkeyPatch.context() as patch:
        compared, plain = with_digests(whole, tiles, patch), with_tiles(whole, tiles)
        for _ in range(3):
            top, bottom = sorted(data.draw(st.tuples(*[st.integers(0, ROWS)] * 2)))
            left, right = sorted(data.draw(st.tuples(*[st.integers(0, COLS)] * 2)))
            block = (TENSOR, range(top, bottom), range(left, right))
            assert torch.equal(compared.read_block(*block), plain.read_block(*block))


@given(covers(), st.data())
def test_other_digests_are_noticed_where_their_rows_are_read_and_nowhere_else(whole, tiles, data):
    with pytest.MonkeyPatch.context() as patch:
        compared = with_digests(whole, tiles, patch)
        number = data.draw(st.integers(0, len(compared.expected[TENSOR]) // digests.WIDTH - 1))
        at = number * digests.WIDTH
        good = compared.expected[TENSOR]
        compared.expected[TENSOR] = good[:at] + "x" * digests.WIDTH + good[at + digests.WIDTH :]
        with pytest.raises(DamagedTensor, match="layer 1 gate"):
            compared.read(TENSOR, Scratch())
        places = [(tile, n) for tile, first in compared._by_place(TENSOR) for n in range(digests.count(tile.region))]
        (region, row, col), stretch = places[number]
        step = digests.stretch_rows(region)
        for one in range(ROWS):
            touched = row + stretch * step <= one < min(row + (stretch + 1) * step, row + region.rows)
            for column in {col, 0}:
                block = (TENSOR, range(one, one + 1), range(column, column + 1))
                if touched and column == col:
                    with pytest.raises(DamagedTensor):
                        compared.read_block(*block)
                elif not touched:
                    compared.read_block(*block)


def test_digests_of_other_tensors_or_cut_otherwise_are_refused(whole):
    recorded = {str(tensor): whole.read_digested(tensor, Scratch())[1] for tensor in whole.tiles}
    fresh = lambda: with_tiles(whole, [(0, 0, ROWS, COLS)])
    assert fresh().expect(recorded, "here").expected.keys() == whole.tiles.keys()
    for change in ({"layer 9 gate": "0" * 16}, {str(TENSOR): "0" * 32}, {str(TENSOR): ""}):
        with pytest.raises(CheckpointError, match=r"(?s)here: the digests are not of the tensors.*layer"):
            fresh().expect({**recorded, **change}, "here")


def test_the_type_of_the_elements_is_part_of_a_digest():
    bytes_ = torch.arange(64, dtype=torch.uint8)
    found = {digests.digest(bytes_.view(dtype)) for dtype in (torch.float32, torch.bfloat16, torch.float16, torch.float64)}
    assert len(found) == 4
