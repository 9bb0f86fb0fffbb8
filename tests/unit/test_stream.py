"""The one loop: what it writes, what it digests, how it shares work, and how much memory it holds."""

from __future__ import annotations

import dataclasses
import itertools
import json
import subprocess
import sys

import pytest
import torch
from dense import SMALL, assert_same_model, labelled_model, random_model, raw_map, read_all
from hypothesis import given
from hypothesis import strategies as st

from megatron_prune.arch.tensors import TensorId
from megatron_prune.checkpoint.stream import StreamReport, content_id, share, stream

Q = TensorId("q", 1)


def empty_map(path, config=SMALL, dtype=torch.float32):
    """A map to write to."""
    return raw_map(path, config, {t: torch.zeros_like(data) for t, data in random_model(config, dtype).items()})


@pytest.mark.parametrize("source, target", list(itertools.product([torch.float32, torch.bfloat16, torch.float16], repeat=2)))
def test_every_tensor_arrives_in_the_dtype_of_the_target_as_torch_casts_it(tmp_path, source, target):
    model = random_model(SMALL, source)
    written = empty_map(tmp_path / "b", dtype=target)
    stream(raw_map(tmp_path / "a", SMALL, model), written)
    assert_same_model(read_all(written), {t: data.to(target) for t, data in model.items()})


def test_what_the_transform_makes_of_the_origin_is_written(tmp_path):
    model = labelled_model(SMALL)
    target = empty_map(tmp_path / "b", dataclasses.replace(SMALL, num_layers=2))
    back = lambda t: t if t.layer is None else TensorId(t.role, 3 - t.layer)
    stream(raw_map(tmp_path / "a", SMALL, model), target, origin=back, transform=lambda t, data, scratch: data.flip(0) * 2)
    assert_same_model(read_all(target), {t: model[back(t)].flip(0) * 2 for t in read_all(target)})


@pytest.mark.parametrize("ranks", [1, 2, 3, 7])
def test_processes_share_the_tensors_and_together_write_the_model(tmp_path, ranks):
    model = random_model(SMALL)
    source, target = raw_map(tmp_path / "a", SMALL, model), empty_map(tmp_path / "b")
    whole, progress = StreamReport(), []
    for rank in range(ranks):
        part = stream(source, target, rank=rank, ranks=ranks, progress=progress.append)
        assert not whole.digests.keys() & part.digests.keys()
        whole.merge(part)
    assert_same_model(read_all(target), model)
    assert whole.digests == stream(source, None).digests and len(whole.digests) == len(model)
    assert sum(progress) == sum(data.nbytes for data in model.values())


@given(st.dictionaries(st.integers(0, 200), st.integers(1, 1000), min_size=1), st.integers(1, 8))
def test_every_tensor_is_dealt_to_one_rank_and_no_rank_has_much_more_than_its_share(sizes, ranks):
    weights = {TensorId("q", layer): size for layer, size in sizes.items()}
    dealt = [share(weights, rank, ranks) for rank in range(ranks)]
    assert sorted(t for part in dealt for t in part) == sorted(weights)
    loads = [sum(weights[t] for t in part) for part in dealt]
    assert max(loads) <= sum(loads) / ranks + max(weights.values())


def digests(tmp_path, model, config=SMALL, name=itertools.count()):
    return stream(raw_map(tmp_path / f"d{next(name)}", config, model), None).digests


def test_the_digest_of_a_tensor_depends_on_its_values_its_dtype_its_shape_and_nothing_else(tmp_path):
    model = random_model(SMALL)
    base = digests(tmp_path, model)
    assert digests(tmp_path, dict(reversed(model.items()))) == base
    for changed in (
        model[Q].clone().index_fill_(0, torch.tensor([23]), 0.0),
        model[Q].clone().neg_(),
        model[Q].bfloat16().float(),
        model[Q].flip(0),
    ):
        other = digests(tmp_path, {**model, Q: changed})
        assert {name for name in base if base[name] != other[name]} == {str(Q)}
    zero = torch.zeros(24, 20)
    plain, half = digests(tmp_path, {**model, Q: zero}), digests(tmp_path, {**model, Q: zero.bfloat16()})
    assert plain[str(Q)] != half[str(Q)]
    assert len({content_id(d) for d in (base, plain, half)}) == 3


def test_a_content_id_does_not_depend_on_the_order_of_tensors_but_on_their_names():
    one = {"a": "1", "b": "2"}
    assert content_id(one) == content_id({"b": "2", "a": "1"})
    assert len({content_id(d) for d in (one, {"a": "2", "b": "1"}, {"a": "1"}, {})}) == 4
    assert content_id(one).startswith("xxh3-sha256:") and len(content_id(one)) == 12 + 64


def test_content_ids_are_those_of_earlier_versions(tmp_path):
    assert content_id(digests(tmp_path, labelled_model(SMALL))) == (
        "xxh3-sha256:83b9a4086a28783e101af33cf434d8551bf7a6b0c13fa87eca15ed5e428e3a9b"
    )


def test_the_digest_is_of_the_transformed_tensor_before_its_change_of_dtype(tmp_path):
    model = random_model(SMALL)
    report = stream(
        raw_map(tmp_path / "a", SMALL, model),
        empty_map(tmp_path / "b", dtype=torch.float16),
        transform=lambda t, x, scratch: x * 2,
    )
    assert report.digests == digests(tmp_path, {t: data * 2 for t, data in model.items()})


@pytest.mark.parametrize(
    "value, target, told",
    [
        (float("nan"), torch.float32, "NaN"),
        (float("inf"), torch.float32, "infinity"),
        (float("-inf"), torch.float32, "infinity"),
        (70000.0, torch.float16, "too large for torch.float16"),
        (-70000.0, torch.float16, "too large for torch.float16"),
        (70000.0, torch.bfloat16, None),
        (65504.0, torch.float16, None),
    ],
)
def test_values_that_are_not_sound_are_told_by_the_tensor_that_holds_them(tmp_path, value, target, told):
    model = random_model(SMALL)
    model[Q][5, 3] = value
    report = stream(raw_map(tmp_path / "a", SMALL, model), empty_map(tmp_path / "b", dtype=target))
    assert list(report.troubled) == ([str(Q)] if told else [])
    assert told is None or told in report.troubled[str(Q)]


def test_an_error_in_one_tensor_is_raised(tmp_path):
    def refuse(tensor, data, scratch):
        raise ArithmeticError(tensor)

    with pytest.raises(ArithmeticError):
        stream(raw_map(tmp_path / "a", SMALL, random_model(SMALL)), empty_map(tmp_path / "b"), transform=refuse)


def test_a_second_try_at_the_same_path_writes_the_new_files_and_not_the_deleted_ones(tmp_path):
    """As after a failed step in a long-lived process: its files are gone, and files of the same names stand there."""
    model, calls = random_model(SMALL), itertools.count()
    source, target = raw_map(tmp_path / "a", SMALL, model), empty_map(tmp_path / "b")

    def fail_late(tensor, data, scratch):
        if next(calls) > 20:
            raise ArithmeticError
        return data

    with pytest.raises(ArithmeticError):
        stream(source, target, transform=fail_late)
    (tmp_path / "b").unlink()
    target = empty_map(tmp_path / "b")
    stream(source, target)
    assert_same_model(read_all(target), model)


# ----------------------------------------------------------------------------------------------------------- memory

MEASURED = """
import json, resource, sys
from pathlib import Path
import torch
from megatron_prune.arch.model import ModelConfig
from megatron_prune.arch.sharding import ParallelLayout
from megatron_prune.arch.tensors import tensor_ids
from megatron_prune.checkpoint import huggingface, legacy, torch_dist
from megatron_prune.checkpoint.megatron_args import megatron_args
from megatron_prune.checkpoint.stream import stream
from megatron_prune.families.family import FAMILIES
from megatron_prune.importance.metric import METRICS
from megatron_prune.importance.scoring import score
from megatron_prune.planning.plan import LayerPlan, Plan, shape_of
from megatron_prune.runtime.world import World
from megatron_prune.surgery.cut import Cut

folder, what = Path(sys.argv[1]), sys.argv[2]
config = ModelConfig(num_layers=6 if what == "score" else 20, hidden_size=512, ffn_hidden_size=2560, num_attention_heads=8, num_query_groups=8,
                     kv_channels=64, vocab_size=2048, tie_embeddings=False)
dtypes = {t: torch.float32 for t in tensor_ids(config)}
family = FAMILIES.get("llama")
source = folder / "hf"
source.mkdir()
huggingface.lay_out(source, config, family, family.hf_config(config, None), dtypes, max_shard_bytes=10**12)
layout = ParallelLayout(tensor=2)


def make(room, name, config):
    (folder / name).mkdir()
    args = megatron_args(config, layout, torch.float32, None)
    room.lay_out(folder / name, config, layout, {t: torch.float32 for t in tensor_ids(config)}, args, {})
    return room.open_map(folder / name, config, layout)


def work(config, tensors):
    if what in ("torch_dist", "torch"):
        stream(tensors, None)
        stream(tensors, make({"torch_dist": torch_dist, "torch": legacy}[what], "out", config))
    elif what == "cut":
        new = {**shape_of(config), "hidden_size": 480, "ffn_hidden_size": 2400}
        layers = [LayerPlan(layer=n, ffn=list(range(2400))) for n in range(config.num_layers)]
        cut = Cut(Plan(old=shape_of(config), new=new, hidden=list(range(480)), layers=layers), config)
        stream(tensors, make(torch_dist, "out", cut.config), origin=cut.origin, transform=cut.transform)
    else:
        wanted = [("hidden", None), ("layer", None)] + [("ffn", n) for n in range(config.num_layers)]
        score(METRICS.get("magnitude")(seed=0), tensors, ParallelLayout(), wanted, World())


tensors = huggingface.open_model(source).tensors
import xxhash
peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
before = peak()
work(config, tensors)
largest = max(tensors.nbytes(t) for t in tensor_ids(config))
total = sum(tensors.nbytes(t) for t in tensor_ids(config))
print(json.dumps({"grown": peak() - before, "largest": largest, "total": total}))
"""


@pytest.mark.parametrize("what", ["torch_dist", "torch", "cut", "score"])
def test_a_large_model_is_handled_in_less_than_four_times_the_memory_of_its_largest_tensor(tmp_path, what):
    done = subprocess.run([sys.executable, "-c", MEASURED, str(tmp_path), what], capture_output=True, text=True, check=True)
    told = json.loads(done.stdout)
    assert told["total"] > (120e6 if what == "score" else 390e6) and told["largest"] < 6e6
    assert told["grown"] < 4 * told["largest"], told
