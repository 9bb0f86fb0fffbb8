"""How metrics with parameters are written, read, refused and recorded."""

from __future__ import annotations

from dataclasses import dataclass, fields

import pytest
import torch
from dense import SMALL, random_model, raw_map
from measured import activations, measured

from megatron_prune.arch.model import ModelConfig
from megatron_prune.arch.sharding import ParallelLayout
from megatron_prune.config import option
from megatron_prune.errors import InputError
from megatron_prune.importance.artifact import FILE, ScoresManifest, load_scores, save_scores
from megatron_prune.importance.metric import METRICS, metric_named
from megatron_prune.importance.parameters import read, separate, written
from megatron_prune.importance.scoring import all_scores
from megatron_prune.planning.plan import shape_of
from megatron_prune.pruning.asked import metrics_of
from megatron_prune.pruning.metric_facts import KNOWN, metric_facts
from megatron_prune.pruning.options import BEST, QUICK, TargetOptions
from megatron_prune.runtime.world import World
from megatron_prune.steps.score import metric_names


@dataclass(frozen=True, kw_only=True)
class Sample:
    share: float = option("how much", 0.5, least=0)
    count: int = option("how many", 3, least=1)
    way: str = option("which way", "flat", choices=["flat", "token"])
    signed: bool = option("with sign", False)


@pytest.mark.parametrize(
    "words, values, spelling",
    [
        ("", {}, "it"),
        ("share=0.25", {"share": 0.25}, "it:share=0.25"),
        ("signed=true,count=7", {"signed": True, "count": 7}, "it:count=7,signed=true"),
        ("way=flat,share=5e-1,signed=false", {}, "it"),
        ("way=token,share=1e-9", {"way": "token", "share": 1e-9}, "it:share=1e-09,way=token"),
    ],
)
def test_words_are_read_and_written_in_one_spelling(words, values, spelling):
    found = read(Sample, words.split(",") if words else [], "metric it")
    assert found == Sample(**values) and written("it", found) == spelling
    assert read(Sample, spelling.partition(":")[2].split(",") if values else [], "metric it") == found


@pytest.mark.parametrize(
    "word, message",
    [
        ("shar=1", "metric it has no parameter 'shar'; did you mean 'share'.*share: how much.*default: 0.5.*way: which way"),
        ("zzz=1", "no parameter 'zzz'\n.*one of"),
        ("share=much", "share: 'much' is not a number.*how much"),
        ("share=nan", "share: 'nan' is not a finite number"),
        ("share=-1", "share: -1.0 is not at least 0"),
        ("count=1.5", "count: '1.5' is not a whole number"),
        ("count=0", "count: 0 is not a positive number"),
        ("way=round", "way: 'round' is none of flat, token"),
        ("way=", "way: nothing is given"),
        ("signed=yes", "signed: 'yes' is neither true nor false"),
        ("share", "share has no value"),
        ("share=1,share=2", "share is given twice"),
    ],
)
def test_what_is_not_a_parameter_is_refused(word, message):
    with pytest.raises(InputError, match=f"(?s){message}"):
        read(Sample, word.split(","), "metric it")


def test_several_metrics_stand_in_one_word():
    assert separate("activation,obs:damping=0.1,a:b=gmm,c=d:e,wanda") == [
        "activation",
        "obs:damping=0.1",
        "a:b=gmm,c=d:e",
        "wanda",
    ]
    assert metric_names(("obs:damping=0.1,wanda", "obs", "obs:damping=0.01")) == ["obs:damping=0.1", "wanda", "obs"]


@pytest.mark.parametrize(
    "text, message",
    [
        ("obz:damping=1", "unknown metric 'obz'; did you mean 'obs'"),
        ("obs:dampin=1", "metric obs has no parameter 'dampin'; did you mean 'damping'"),
        ("obs:damping=0", "damping: 0.0 is not at least"),
        ("fisher:a=1", "metric fisher takes no parameters"),
        ("obs:", "'obs:' names no parameter"),
        ("activation,damping=1", "no name stands before damping=1"),
    ],
)
def test_metrics_are_refused_by_what_is_wrong_with_them(text, message):
    with pytest.raises(InputError, match=message):
        metric_names((text,))
    with pytest.raises(InputError, match=message):
        metrics_of(TargetOptions(metric=text), has_text=True)


@pytest.mark.parametrize("name", METRICS.names())
def test_parameters_of_every_metric_are_described_and_left_out_of_its_spelling_by_default(name):
    metric = metric_named(name)
    assert metric.spelling == name == metric.name
    for item in fields(metric.Parameters):
        assert item.metadata["help"] and metric_named(f"{name}:{item.name}={item.default}").spelling == name


def test_a_request_names_metrics_in_one_spelling():
    chosen = metrics_of(TargetOptions(metric="obs:damping=1e-1", depth_metric="fold:ridge=0.3"), has_text=True)
    assert chosen == {axis: "obs:damping=0.1" for axis in ("hidden", "ffn", "head", "kv_head")} | {"layer": "fold"}
    held = ["wanda", "obs:damping=0.1"]
    assert metrics_of(TargetOptions(), has_text=True, held=held)["kv_head"] == "obs:damping=0.1"
    assert metrics_of(TargetOptions(), has_text=True, held=[*held, "obs"])["kv_head"] == "obs"


def test_parameters_change_what_they_say_and_scores_are_kept_by_spelling(tmp_path):
    tensors, statistics = (
        raw_map(tmp_path / "bytes", SMALL, random_model(SMALL)),
        measured(tmp_path / "s", SMALL, activations(SMALL)),
    )
    names = ["obs", "obs:damping=0.5", "fold:ridge=2.0", "random"]
    scores = {name: all_scores(metric_named(name, statistics=statistics), tensors, ParallelLayout(), World()) for name in names}
    assert (scores["obs:damping=0.5"]["ffn", 0] - scores["obs"]["ffn", 0]).abs().max() > 0.01 * scores["obs"]["ffn", 0].max()
    save_scores(tmp_path, scores)
    (tmp_path / FILE).write_text(manifest(SMALL, names).dumps())
    assert ScoresManifest.load(tmp_path).metrics == names
    for name in names:
        found = load_scores(tmp_path, name)
        assert found.keys() == scores[name].keys()
        assert all(torch.equal(found[place], scores[name][place]) for place in found)
    with pytest.raises(InputError, match="holds no scores of obs:damping=0.25"):
        load_scores(tmp_path, "obs:damping=0.25")


def manifest(config: ModelConfig, metrics: list[str]) -> ScoresManifest:
    empty = {"digest": "", "sources": []}
    return ScoresManifest(
        content_id="",
        model=shape_of(config),
        metrics=metrics,
        moments=[],
        calibration=empty,
        dtype="fp32",
        parallel={"tensor": 1},
    )


def test_what_is_known_of_metrics_without_loading_them_is_what_they_say():
    """And it covers what is taken where none is named."""
    for name, facts in KNOWN.items():
        metric = metric_named(name)
        said = (metric.spelling, metric.axes, metric.needs, metric.moments, metric.block_wise)
        assert (facts.spelling, facts.axes, facts.needs, facts.moments, facts.block_wise) == said, name
    assert {*BEST.values(), QUICK["metric"], "angular"} <= set(KNOWN)
    assert metric_facts("obs:damping=0.1") == KNOWN["obs"]._replace(spelling="obs:damping=0.1")
