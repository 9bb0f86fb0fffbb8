"""What a block kind says holds together; and a kind that is one more file is known everywhere."""

from __future__ import annotations

import dataclasses
from math import prod

import pytest
import torch
from dense import SMALL

from megatron_prune.arch.adapter import targets
from megatron_prune.arch.blocks import block as blocks
from megatron_prune.arch.blocks.block import BLOCKS, OUTER, BlockKind, MegatronTensor, Role, kind_of, replicated, spaces
from megatron_prune.arch.model import _kinds
from megatron_prune.arch.sharding import ParallelLayout, layer_tensors, patches, shard
from megatron_prune.arch.tensors import layer_roles, parameter_count, tensor_ids, tensor_shape
from megatron_prune.axes.axis import AXES
from megatron_prune.files.region import Scratch
from megatron_prune.importance.statistics import site_of, sites
from megatron_prune.surgery.maps import SpaceMap, carried


@pytest.mark.parametrize("name", BLOCKS.names())
def test_a_kind_names_roles_that_it_has_in_spaces_that_fit(name):
    kind = BLOCKS.get(name)
    own = {role.name: role.spaces for role in kind.roles}
    assert kind.name == name and len(own) == len(kind.roles) and not own.keys() & {role.name for role in OUTER}
    assert own[kind.norm] == own[kind.after_norm] == ("hidden",)
    assert all(own[role][1] == "hidden" for role in kind.readers) and own[kind.writer] == ("hidden", kind.inside_space)
    assert kind.inputs.keys() == set(kind.matrices) and {kind_of(role) for role in own} == {kind}
    finest = AXES.get(kind.axes[0]).owns(SMALL)
    assert kind.inside_space in finest
    for axis in kind.axes:  # a unit of any axis is whole units of the finest
        assert AXES.get(axis).owns(SMALL)[kind.inside_space] % finest[kind.inside_space] == 0


@pytest.mark.parametrize("name", BLOCKS.names())
def test_megatrons_tensors_hold_every_role_of_a_kind_once(name):
    kind = BLOCKS.get(name)
    held = [role for tensor in kind.megatron for role in tensor.roles]
    assert sorted(held) == sorted(role.name for role in kind.roles)
    for tensor in kind.megatron:
        assert {spaces(role)[1:] for role in tensor.roles} == {spaces(tensor.roles[0])[1:]}
        assert bool(tensor.axis) == (tensor.split != "none") and tensor.axis in ("", *AXES.names())


def test_a_role_of_two_kinds_means_the_same_in_both():
    found: dict[str, tuple[str, ...]] = {}
    for role in (role for name in BLOCKS.names() for role in BLOCKS.get(name).roles):
        assert found.setdefault(role.name, role.spaces) == role.spaces


PLAIN = BlockKind(
    name="plain",
    half="mlp",
    roles=(
        Role("fc_norm", ("hidden",)),
        Role("fc_in", ("ffn", "hidden")),
        Role("fc_in_bias", ("ffn",)),
        Role("fc_out", ("hidden", "ffn")),
        Role("fc_after_norm", ("hidden",), "after_norms"),
    ),
    norm="fc_norm",
    readers=("fc_in",),
    inside="between",
    inside_space="ffn",
    writer="fc_out",
    after_norm="fc_after_norm",
    axes=("ffn",),
    mixes_tokens=False,
    megatron=(
        replicated("mlp.linear_fc1.layer_norm_weight", "pre_mlp_layernorm.weight", "fc_norm"),
        MegatronTensor(
            name="mlp.linear_fc1.weight", local_name="mlp.linear_fc1.weight", roles=("fc_in",), split="rows", axis="ffn"
        ),
        MegatronTensor(
            name="mlp.linear_fc1.bias", local_name="mlp.linear_fc1.bias", roles=("fc_in_bias",), split="rows", axis="ffn"
        ),
        MegatronTensor(
            name="mlp.linear_fc2.weight", local_name="mlp.linear_fc2.weight", roles=("fc_out",), split="cols", axis="ffn"
        ),
        replicated("mlp.linear_fc2.post_layernorm.weight", "mlp.linear_fc2.post_layernorm.weight", "fc_after_norm"),
    ),
)
"""A feed-forward block without a gate, as OPT has it."""


@pytest.fixture
def plain(monkeypatch):
    """A model with such blocks; the kind is registered as its file would."""
    caches = (blocks._spaces, kind_of, targets, layer_roles, _kinds)
    monkeypatch.setitem(BLOCKS._entries, "plain", PLAIN)
    for cached in caches:
        cached.cache_clear()
    yield dataclasses.replace(SMALL, blocks=("attention", "plain"))
    monkeypatch.undo()
    for cached in caches:
        cached.cache_clear()


def test_a_kind_that_is_one_more_file_is_known_to_tables_statistics_shards_maps_and_adapters(plain):
    roles = layer_roles(plain)
    assert roles[-4:] == ("fc_norm", "fc_in", "fc_in_bias", "fc_out") and "gate" not in roles
    assert tensor_shape("fc_out", plain) == (20, 24) and tensor_shape("fc_in_bias", plain) == (24,)
    assert {tensor.role for tensor in tensor_ids(plain)} > {"fc_in", "q"}
    gate = prod(tensor_shape("gate", SMALL)) - tensor_shape("fc_in_bias", plain)[0]
    assert parameter_count(SMALL) - parameter_count(plain) == SMALL.num_layers * gate
    assert sites(plain.kinds)["between"] == "ffn" and site_of("fc_out") == "between" and site_of("fc_in") == "fc_norm"
    assert targets()["fc_in_proj"] == ("fc_in",) and plain.block_of("ffn") is PLAIN
    held = {tensor.name: tensor for tensor in layer_tensors(plain)}
    bias = held["mlp.linear_fc1.bias"]
    part = shard(bias, bias.full_shape(plain, ParallelLayout(tensor=2)), 2, 1)
    assert [(p.role, p.row, p.rows) for p in patches(bias, plain, 24, part)] == [("fc_in_bias", 12, 12)]
    kept = SpaceMap.select(torch.tensor([5, 2]), 24)
    matrix = torch.arange(480.0).view(24, 20)
    assert torch.equal(carried("fc_in", matrix, {"ffn": kept}, Scratch()), matrix[[5, 2]])
    assert torch.equal(carried("fc_out", matrix.T.contiguous(), {"ffn": kept}, Scratch()), matrix.T[:, [5, 2]])


def test_a_map_selects_or_turns_by_the_same_rule():
    """What writes takes ``write``, what reads ``read``: a turned stream gives the same product."""
    torch.manual_seed(0)
    turn = torch.linalg.qr(torch.randn(6, 6, dtype=torch.float64))[0]
    writer, reader = torch.randn(6, 4, dtype=torch.float64), torch.randn(5, 6, dtype=torch.float64)
    stream = SpaceMap.linear(turn.T, turn)
    turned = carried("down", writer, {"hidden": stream}, Scratch()), carried("up", reader, {"hidden": stream}, Scratch())
    torch.testing.assert_close(turned[1] @ turned[0], reader @ writer)
    chosen = SpaceMap.select(torch.tensor([4, 0]), 6)
    same = SpaceMap.linear(chosen.write, chosen.read)
    for role, matrix in (("down", writer), ("up", reader)):
        assert torch.equal(
            carried(role, matrix, {"hidden": chosen}, Scratch()), carried(role, matrix, {"hidden": same}, Scratch())
        )
