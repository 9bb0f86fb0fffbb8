"""The ``score`` verb and pruning by kept scores: the same at every layout, kept whole, gone on with when stopped."""

from __future__ import annotations

import fcntl
import json
import re
from pathlib import Path

import pytest
import rank_jobs_collect as jobs
import torch
from safetensors.torch import load_file
from tiny import TEXT, state_dict

from megatron_prune.arch.model import ModelConfig
from megatron_prune.arch.tensors import parameter_count
from megatron_prune.checkpoint import megatron
from megatron_prune.cli.main import main
from megatron_prune.importance.artifact import ScoresManifest, load_calibration_file, load_scores
from megatron_prune.importance.metric import METRICS
from megatron_prune.planning.make import make_plan
from megatron_prune.planning.plan import load_plan, shape_of
from megatron_prune.planning.target import needed_scores, resolve_target
from megatron_prune.pruning.options import BEST
from megatron_prune.runtime.world import World
from megatron_prune.steps.convert import ConvertOptions, convert
from megatron_prune.steps.export import ExportOptions, export

LAYERS = ["layer_0000", "layer_0001", "layer_0002", "layer_0003", "final"]
LAYOUTS = [(2, 1, 1), (3, 1, 1), (1, 2, 1), (1, 1, 2), (2, 2, 1)]
"""TP, PP, DP."""
TEXT_OPTIONS = {"nsamples": 6, "seq_length": 16, "tensor_model_parallel_size": 1, "pipeline_model_parallel_size": 1}


@pytest.fixture(scope="module")
def home(tiny, tmp_path_factory) -> Path:
    """``qwen2`` and ``other`` (the same shape, other weights) at TP 1 in float32, and ``text.txt``."""
    home = tmp_path_factory.mktemp("scores")
    for name, changes in (("qwen2", {}), ("other", {"seed": 1})):
        convert(ConvertOptions(load=str(tiny("qwen2", dtype="float32", **changes)), save=str(home / name)), World())
    (home / "text.txt").write_text("".join(f"{number}: {TEXT}" for number in range(60)))
    return home


def score_options(home: Path, save: Path, **changes) -> dict:
    options = {"load": str(home / "qwen2"), "save": str(save), "data": (f"{home / 'text.txt'}:1",), **TEXT_OPTIONS}
    return {**options, **changes}


@pytest.fixture(scope="module")
def scored(home, ranks):
    """``scored(tp, pp, dp)`` → scores of every metric there is, made at that layout."""

    def get(tp: int = 1, pp: int = 1, dp: int = 1) -> Path:
        folder = home / f"scores{tp}{pp}{dp}"
        if not folder.exists():
            changes = {"metrics": tuple(METRICS.names()), "tensor_model_parallel_size": tp, "pipeline_model_parallel_size": pp}
            found = ranks(tp * pp * dp).run(jobs.step_measuring, "score", score_options(home, folder, **changes))
            assert [raised for raised, _ in found] == [None] * (tp * pp * dp)
        return folder

    return get


def prune(pool, home: Path, save: Path, **options) -> list[str]:
    """Prune ``qwen2`` → the layers that were measured and re-fitted on the way; the plan is ``SAVE.json``."""
    options = {"load": str(home / "qwen2"), "save": str(save), "save_plan": f"{save}.json", **TEXT_OPTIONS, **options}
    [(raised, filed)] = pool.run(jobs.step_measuring, "prune", options)
    assert raised is None
    return filed


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


# ------------------------------------------------------------------------------------------- the same at every layout

TARGETS = {
    "hidden": [{"hidden_size": 36}, {"hidden_size": 12}],
    "ffn": [{"ffn_hidden_size": 60}, {"ffn_hidden_size": 12}],
    "kv_head": [{"num_query_groups": 3}],
    "head": [{"num_attention_heads": 6, "num_query_groups": 6}],
    "layer": [{"num_layers": 3}, {"num_layers": 2}],
}


def plans(config: ModelConfig, scores: dict) -> list:
    found = []
    for axis in dict.fromkeys(axis for axis, _ in scores if axis != "block"):
        for sizes in TARGETS[axis]:
            target = resolve_target(config, **sizes)
            assert {place[0] for place in needed_scores(config, target)} == {axis}
            for prune_type in ("balance", "global", "unbalance"):
                made = {"prune_type": prune_type, "ranks": 3, "made_by": {}, "content_id": None}
                found.append(make_plan(config, target, scores, **made))
    return found


@pytest.mark.parametrize("name", METRICS.names())
def test_every_metric_gives_the_same_scores_and_plans_at_every_layout(scored, home, name):
    config = megatron.open_checkpoint(home / "qwen2").config
    alone = load_scores(scored(), name)
    assert {axis for axis, _ in alone} - {"block"} == METRICS.get(name).axes
    for layout in LAYOUTS:
        ours = load_scores(scored(*layout), name)
        assert ours.keys() == alone.keys()
        for key, value in alone.items():
            assert ours[key].shape == value.shape and value.isfinite().all()
            assert ((ours[key] - value).abs() <= 1e-4 * value.abs() + 1e-6 * value.abs().max()).all(), (layout, key)
        assert plans(config, ours) == plans(config, alone), layout


# ---------------------------------------------------------------------------------------------------------- the artifact


def test_scores_are_kept_with_what_they_were_made_from(scored, home):
    folder, checkpoint = scored(3, 1, 1), megatron.open_checkpoint(home / "qwen2")
    expected = ["calibration.json", "calibration.safetensors", *(f"{name}.safetensors" for name in LAYERS)]
    expected += ["gradients.safetensors", "losses.safetensors", "scores.json", "scores.safetensors"]
    assert sorted(contents(folder)) == sorted(expected)
    manifest = ScoresManifest.load(folder)
    assert manifest.content_id == checkpoint.manifest.content_id and manifest.model == shape_of(checkpoint.config)
    assert (
        manifest.metrics == METRICS.names() and manifest.moments == ["channels", "context", "rows"] and manifest.dtype == "fp32"
    )
    assert manifest.parallel == {"tensor": 3, "pipeline": 1, "data": 1}
    calibration = load_calibration_file(folder)
    assert calibration.tokens.shape == (6, 16) and manifest.calibration["digest"] == calibration.digest
    [source] = manifest.calibration["sources"]
    assert source["samples"] == 6 and source["tokens"] == 96 and source["seed"] == 1234 and source["share"] == 1.0
    assert source["name"].endswith("text.txt") and source["digest"]
    assert json.loads((folder / "scores.json").read_text())["format"] == "megatron-prune scores"


def test_the_text_of_the_scores_does_not_depend_on_the_layout(scored):
    one, other = (load_calibration_file(scored(*layout)) for layout in ((1, 1, 1), (2, 2, 1)))
    assert torch.equal(one.tokens, other.tokens) and one.digest == other.digest


def test_a_single_metric_measures_no_more_than_it_needs(home, ranks, tmp_path):
    ranks(1).run(jobs.step_measuring, "score", score_options(home, tmp_path / "s", metrics=("activation,angular", "magnitude")))
    assert sorted(ScoresManifest.load(tmp_path / "s").metrics) == ["activation", "angular", "magnitude"]
    assert not any("moment" in key for key in load_file(tmp_path / "s/layer_0000.safetensors"))
    assert not (tmp_path / "s/gradients.safetensors").exists()
    [(raised, filed)] = ranks(1).run(
        jobs.step_measuring, "score", score_options(home, tmp_path / "m", metrics=("magnitude",), data=None)
    )
    assert raised is None and filed == []


def test_an_existing_artifact_is_replaced_only_when_that_is_asked_for(home, ranks, tmp_path):
    run = lambda **more: ranks(1).run(
        jobs.step_measuring, "score", score_options(home, tmp_path / "s", metrics=("activation",), **more)
    )[0]
    assert run()[0] is None
    assert run(seed=5) == ("InputError", [])
    assert load_calibration_file(tmp_path / "s").provenance[0]["seed"] == 1234
    assert run(seed=5, overwrite=True) == (None, LAYERS)
    assert load_calibration_file(tmp_path / "s").provenance[0]["seed"] == 5
    assert [path.name for path in tmp_path.iterdir()] == ["s"]


# ------------------------------------------------------------------------------------------------------ pruning by scores

SELECT = {"hidden_method": "select", "refit": False}
"""Where hidden units may be cut."""


@pytest.mark.parametrize(
    "sizes, metric",
    [
        ({"hidden_size_remain": 36, "ffn_hidden_size_remain": 48}, "activation"),
        ({"num_query_groups_remain": 3, "num_layers_remain": 2}, "wanda"),
        ({"ffn_hidden_size_remain": 24}, "obs"),
        ({"ffn_hidden_size_remain": 48}, "taylor_2nd"),
    ],
)
def test_any_target_is_planned_from_kept_scores_without_a_pass(scored, home, ranks, tmp_path, sizes, metric):
    before = contents(scored())
    asked = {**(SELECT if "hidden_size_remain" in sizes else {"refit": False}), **sizes}
    assert prune(ranks(1), home, tmp_path / "cut", scores=str(scored()), metric=metric, **asked) == []
    plan, scores = load_plan(tmp_path / "cut.json"), load_scores(scored(), metric)
    config = megatron.open_checkpoint(home / "qwen2").config
    target = resolve_target(config, **{name.removesuffix("_remain"): value for name, value in sizes.items()})
    depth = {place: value for place, value in load_scores(scored(), BEST["layer"]).items()}
    made = make_plan(config, target, {**scores, **depth}, prune_type="balance", ranks=1, made_by={}, content_id=None)
    assert (plan.hidden, plan.layers, plan.new) == (made.hidden, made.layers, made.new)
    calibration = ScoresManifest.load(scored()).calibration
    assert plan.made_by["metric"] == metric and plan.made_by["calibration"] == calibration
    assert contents(scored()) == before and sorted(path.name for path in tmp_path.iterdir()) == ["cut", "cut.json"]


def test_scores_made_anew_and_kept_ones_give_the_same_plan(scored, home, ranks, tmp_path):
    sizes = {"ffn_hidden_size_remain": 48, "num_query_groups_remain": 4, "num_layers_remain": 2, "refit": False}
    assert prune(ranks(1), home, tmp_path / "kept", scores=str(scored()), **sizes) == []
    assert prune(ranks(1), home, tmp_path / "anew", data=(f"{home / 'text.txt'}:1",), **sizes) == LAYERS
    kept, anew = (load_plan(tmp_path / f"{name}.json") for name in ("kept", "anew"))
    assert kept.layers == anew.layers and kept.made_by["calibration"]["digest"] == anew.made_by["calibration"]["digest"]


@pytest.mark.parametrize("metric", ["activation", "obs"])
@pytest.mark.parametrize(
    "budget", [{"ratio": 0.25}, {"ratio": 0.5}, {"params": "100K"}, {"memory": "400KB", "memory_seq_length": 64}]
)
def test_a_budget_gives_a_shape_within_it_that_transformers_loads(scored, home, ranks, tmp_path, budget, metric):
    from transformers import AutoModelForCausalLM

    assert prune(ranks(1), home, tmp_path / "cut", scores=str(scored()), metric=metric, **SELECT, **budget) == []
    old, new = (megatron.open_checkpoint(path).config for path in (home / "qwen2", tmp_path / "cut"))
    if "memory" in budget:
        values = 2 * 64 * new.num_layers * new.num_query_groups * new.kv_channels
        assert 0.8 * 400_000 < 4 * (parameter_count(new) + values) <= 400_000
    else:
        limit = 100_000 if "params" in budget else parameter_count(old) * (1 - budget["ratio"])
        assert 0.85 * limit < parameter_count(new) <= limit
    export(ExportOptions(load=str(tmp_path / "cut"), save=str(tmp_path / "hf")), World())
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "hf", dtype=torch.float32)
    assert model.num_parameters() == parameter_count(new)
    assert model(torch.arange(8)[None]).logits.isfinite().all()


def test_a_metric_with_parameters_is_kept_and_recorded_by_them(home, ranks, tmp_path):
    named = ("obs,obs:damping=1e-1", "obs:damping=0.01")
    changes = {"metrics": named, "tensor_model_parallel_size": 2}
    ranks(2).run(jobs.step_measuring, "score", score_options(home, tmp_path / "s", **changes))
    assert ScoresManifest.load(tmp_path / "s").metrics == ["obs", "obs:damping=0.1"]
    damped = load_scores(tmp_path / "s", "obs:damping=0.1")
    assert not torch.allclose(damped["ffn", 0], load_scores(tmp_path / "s", "obs")["ffn", 0], rtol=1e-3)
    asked = {"metric": "obs:damping=0.1", "ffn_hidden_size_remain": 24, "refit": False}
    assert prune(ranks(1), home, tmp_path / "kept", scores=str(tmp_path / "s"), **asked) == []
    assert prune(ranks(1), home, tmp_path / "anew", data=(f"{home / 'text.txt'}:1",), **asked) == LAYERS
    kept, anew = (load_plan(tmp_path / f"{name}.json") for name in ("kept", "anew"))
    assert kept.layers == anew.layers and kept.made_by["metric"] == anew.made_by["metric"] == "obs:damping=0.1"


def test_a_metric_that_cannot_score_hidden_leaves_it_whole_under_a_budget(scored, home, ranks, tmp_path):
    prune(ranks(1), home, tmp_path / "cut", scores=str(scored()), metric="obs", ratio=0.25, **SELECT)
    assert load_plan(tmp_path / "cut.json").new["hidden_size"] == 48


def test_kept_scores_are_re_fitted_on_their_own_text(scored, home, ranks, tmp_path):
    filed = prune(ranks(1), home, tmp_path / "cut", scores=str(scored()), ffn_hidden_size_remain=48)
    assert filed == [f"refit/{name}" for name in (*LAYERS[:4], "outer")]
    plan = load_plan(tmp_path / "cut.json")
    assert plan.made_by["calibration"] == ScoresManifest.load(scored()).calibration and "refit" in plan.made_by


# ---------------------------------------------------------------------------------------------------------------- refused


@pytest.fixture
def refused(tmp_path, capsys):
    """``refused([words], "pattern")``: exit code 2, a message with the pattern, ``tmp_path`` as it was."""

    def check(argv: list, pattern: str) -> None:
        before = contents(tmp_path), sorted(tmp_path.rglob("*"))
        capsys.readouterr()
        with pytest.raises(SystemExit) as left:
            main([str(word) for word in argv])
        message = capsys.readouterr().err
        assert left.value.code == 2, message
        assert re.search(pattern, message, re.DOTALL), f"{pattern!r} is not in:\n{message}"
        assert (contents(tmp_path), sorted(tmp_path.rglob("*"))) == before

    return check


def words(home: Path, verb: str, tmp_path: Path, *more: object) -> list:
    small = ["--nsamples", 4, "--seq-length", 16]
    return [verb, "--load", home / "qwen2", "--save", tmp_path / "out", *small, *more]


def test_scores_of_another_checkpoint_are_refused(scored, home, tiny, tmp_path, refused):
    base = ["--save", tmp_path / "out", "--scores", scored(), "--ffn_hidden_size_remain", 48]
    refused(["prune", "--load", home / "other", *base], "made from another model of the same shape.*score this checkpoint")
    convert(ConvertOptions(load=str(tiny("qwen3")), save=str(tmp_path / "wider")), World())
    convert(ConvertOptions(load=str(tiny("llama")), save=str(tmp_path / "llama")), World())
    refused(["prune", "--load", tmp_path / "llama", *base], "another shape.*num_query_groups: 6 there, 12 here")
    refused(["prune", "--load", tmp_path / "wider", *base], "another model")


def test_scores_that_are_not_there(scored, home, tmp_path, refused):
    base = words(home, "prune", tmp_path, "--ffn_hidden_size_remain", 48, "--scores")
    refused([*base, tmp_path / "nowhere"], "--scores .*nowhere: no such file or directory")
    refused([*base, home / "qwen2"], "holds no finished scores.*megatron-prune score")
    few = home / "few"
    if not few.exists():
        main([str(word) for word in words(home, "score", tmp_path, "--data", f"{home / 'text.txt'}:1", "--metrics", "wanda")])
        (tmp_path / "out").rename(few)
    refused([*base, few, "--metric", "activation"], "holds no scores of activation.*wanda.*--metrics activation")
    refused([*base[:-3], "--num_layers_remain", 2, "--scores", few, "--depth_metric", "angular"], "holds no scores of angular")


@pytest.mark.parametrize("verb", ["score", "prune"])
@pytest.mark.parametrize(
    "text, more, message",
    [
        ("short", [], "text holds fewer tokens than asked for.*64 tokens \\(4 samples of 16\\).*--nsamples"),
        ("", [], "text.*empty"),
        (TEXT * 50, ["--seq-length", 65], "--seq-length.*65.*at most the model's 64"),
        (TEXT * 50, ["--nsamples", 0], "--nsamples.*0.*positive"),
        (TEXT * 50, ["--seed", -1], "--seed.*-1"),
        (None, [], "text"),
    ],
)
def test_text_that_does_not_do(home, tmp_path, refused, verb, text, more, message):
    if text is not None:
        (tmp_path / "text").write_text(text)
    more = [*more, *(["--ffn_hidden_size_remain", 48] if verb == "prune" else [])]
    refused(words(home, verb, tmp_path, "--data", f"{tmp_path / 'text'}:1", *more), message)


@pytest.mark.parametrize(
    "more, message",
    [
        ("--metric beauty --ffn-hidden-size-remain 48", "beauty.*activation.*wanda"),
        ("--depth-metric beauty --num-layers-remain 2", "beauty.*activation.*wanda"),
        ("--metric fisher:damping=0.1 --ffn-hidden-size-remain 48", "metric fisher takes no parameters"),
        ("--metric obs:damping=-1 --ffn-hidden-size-remain 48", "metric obs: damping: -1.0 is not at least"),
        ("--metric obs --num-layers-remain 2 --depth-metric obs", "obs cannot score the axis layer.*block_influence"),
        (
            "--metric fluctuation --hidden-size-remain 36 --hidden-method select",
            "fluctuation cannot score the axis hidden.*wanda",
        ),
        ("--metric angular --ffn-hidden-size-remain 48", "angular cannot score the axis ffn.*activation"),
        ("--ratio 0.25 --ffn-hidden-size-remain 48", "a budget and --ffn-hidden-size-remain"),
        ("--ratio 0.25 --params 100K", "ratio.*params|params.*ratio"),
        ("--ratio 1.5", "ratio.*1.5"),
        ("--params 10", "no shape meets the budget.*at least .*smallest shape is hidden"),
        ("--params 100K --multiple-of width=7", "width.*hidden"),
        ("--ffn-hidden-size-remain 50 --multiple-of ffn=16", "50 is not a multiple of 16; nearest: 48 or 64"),
        ("--ratio 0.3 --metric random --search 3", "--search compares re-fitted models"),
        ("--ffn-hidden-size-remain 48 --search 3", "--search compares re-fitted models of several shapes"),
        ("--ffn-hidden-size-remain 48 --metric random --reconstruct 9", "--reconstruct where nothing is re-fitted"),
        ("--ffn-hidden-size-remain 48 --no-refit --sequential --ridge 1", "--sequential, --ridge where nothing is re-fitted"),
        ("--ffn-hidden-size-remain 48 --dtype fp16", "gradients in fp16.*metrics fisher.*bf16"),
        ("--ffn-hidden-size-remain 48 --metric random --seed -1", "--seed.*-1"),
        ("--metric magnitude --hidden-method rotate --hidden-size-remain 36", "rotate needs text.*--data"),
        (f"--plan {__file__} --ratio 0.25", "--plan and --ratio both say what stays"),
        (f"--plan {__file__} --ffn-hidden-size-remain 48 --metric wanda", "--plan and --metric, --ffn-hidden-size-remain"),
    ],
)
def test_a_request_that_cannot_be_met(home, tmp_path, refused, more, message):
    refused(words(home, "prune", tmp_path, *more.split()), message)


@pytest.mark.parametrize(
    "more, message",
    [
        ("--metrics beauty", "beauty.*activation"),
        ("--metrics ,", "--metrics names none"),
        ("--metrics activation,obs:dampin=0.1", "metric obs has no parameter 'dampin'; did you mean 'damping'"),
        ("--metrics fold:ridge=high", "metric fold: ridge: 'high' is not a number"),
        ("--metrics activation,taylor --dtype fp16", "gradients in fp16.*metrics taylor"),
    ],
)
def test_metrics_that_do_not_exist_are_not_measured(home, tmp_path, refused, more, message):
    refused(words(home, "score", tmp_path, *more.split()), message)


def test_scores_over_a_full_directory_or_over_the_model_are_refused(home, tmp_path, refused):
    (tmp_path / "out").mkdir()
    (tmp_path / "out/precious").write_text("kept")
    refused(words(home, "score", tmp_path), "out exists.*--overwrite")
    for save in ("qwen2", "qwen2/release", "qwen2/new", "."):
        refused(["score", "--load", home / "qwen2", "--save", home / save, "--overwrite"], "is, holds or lies in the input")


def test_a_rotated_plan_needs_text(home, ranks, tmp_path, refused):
    """Without it there is nothing to find the rotation by, and no channel stays as it was."""
    prune(ranks(1), home, tmp_path / "rotated", data=(f"{home / 'text.txt'}:1",), hidden_size_remain=36)
    plan = tmp_path / "rotated.json"
    refused(words(home, "prune", tmp_path, "--plan", plan), "rotates the stream, which needs text.*--data")
    again = prune(ranks(1), home, tmp_path / "again", data=(f"{home / 'text.txt'}:1",), plan=str(plan))
    assert again[-1] == "refit/outer"
    for name in ("rotated", "again"):
        export(ExportOptions(load=str(tmp_path / name), save=str(tmp_path / f"{name}_hf")), World())
    ours, theirs = (state_dict(tmp_path / f"{name}_hf") for name in ("rotated", "again"))
    assert all(torch.equal(ours[key], theirs[key]) for key in theirs)


@pytest.mark.parametrize("verb", ["score", "prune"])
def test_an_output_that_another_run_works_on_is_refused_on_every_rank(home, ranks, tmp_path, verb):
    """Nobody is left waiting for the rank that noticed."""
    work = tmp_path / ".out.work"
    (work / "content").mkdir(parents=True)
    options = {"load": str(home / "qwen2"), "save": str(tmp_path / "out"), "data": (f"{home / 'text.txt'}:1",)}
    options |= {**TEXT_OPTIONS, "tensor_model_parallel_size": 3}
    if verb == "prune":
        options |= {"ffn_hidden_size_remain": 48}
    with open(work / ".megatron_prune", "w") as mark:
        fcntl.flock(mark, fcntl.LOCK_EX)
        assert ranks(3).run(jobs.step_measuring, verb, options) == [("InputError", [])] * 3
    assert sorted(path.name for path in work.iterdir()) == [".megatron_prune", "content"]


# ---------------------------------------------------------------------------------------------------- stopped and gone on


def killed(pool, step: str, options: dict, prefix: str, number: int) -> list[str]:
    [(raised, filed)] = pool.run(jobs.step_measuring, step, options, kill=(prefix, number))
    assert raised == "KeyboardInterrupt"
    return filed


def test_scoring_that_was_stopped_goes_on(home, ranks, tmp_path):
    options = lambda name: score_options(home, tmp_path / name, metrics=("activation", "obs", "angular"))
    assert ranks(1).run(jobs.step_measuring, "score", options("whole")) == [(None, LAYERS)]
    assert killed(ranks(1), "score", options("part"), "layer", 2) == LAYERS[:2]
    assert sorted(path.name for path in tmp_path.iterdir()) == [".part.work", "whole"]
    assert ranks(1).run(jobs.step_measuring, "score", options("part")) == [(None, LAYERS[2:])]
    assert contents(tmp_path / "part") == contents(tmp_path / "whole")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["part", "whole"]


@pytest.mark.parametrize("change", [{"seed": 6}, {"nsamples": 5}, {"metrics": ("activation", "fluctuation")}, {"dtype": "bf16"}])
def test_scoring_of_another_kind_starts_from_nothing(home, ranks, tmp_path, change):
    options = score_options(home, tmp_path / "part", metrics=("activation",))
    killed(ranks(1), "score", options, "layer", 2)
    assert ranks(1).run(jobs.step_measuring, "score", {**options, **change}) == [(None, LAYERS)]


CUT = {"hidden_size_remain": 36, "ffn_hidden_size_remain": 48, "num_layers_remain": 3}
FITTED = [*(f"refit/{name}" for name in LAYERS[:3]), "refit/outer"]


@pytest.fixture(scope="module")
def whole(home, ranks):
    """A pruning that nothing stopped."""
    if not (home / "whole").exists():
        filed = prune(ranks(1), home, home / "whole", data=(f"{home / 'text.txt'}:1",), **CUT)
        assert filed == [*LAYERS, *FITTED]
    return home / "whole"


@pytest.mark.parametrize("prefix, number", [("layer", 2), ("refit", 2)])
def test_pruning_that_was_stopped_goes_on(home, whole, ranks, tmp_path, prefix, number):
    data = (f"{home / 'text.txt'}:1",)
    options = {"load": str(home / "qwen2"), "save": str(tmp_path / "cut"), "data": data, **TEXT_OPTIONS, **CUT}
    done = killed(ranks(1), "prune", options, prefix, number)
    assert sorted(path.name for path in tmp_path.iterdir()) == [".cut.work"]
    rest = prune(ranks(1), home, tmp_path / "cut", data=data, **CUT)
    assert [*done, *rest] == [*LAYERS, *FITTED]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["cut", "cut.json"]
    assert load_plan(tmp_path / "cut.json") == load_plan(Path(f"{whole}.json"))
    for path in (whole, tmp_path / "cut"):
        export(ExportOptions(load=str(path), save=str(tmp_path / f"{path.name}_hf")), World())
    ours, theirs = (state_dict(tmp_path / f"{name}_hf") for name in ("cut", "whole"))
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[key], theirs[key]) for key in ours)


@pytest.mark.parametrize(
    "change",
    [{"ffn_hidden_size_remain": 24}, {"hidden_size_remain": 24}, {"ridge": 0.5}, {"sequential": True}, {"num_layers_remain": 2}],
    ids=lambda change: next(iter(change)),
)
def test_layers_re_fitted_for_another_cut_are_not_used(home, ranks, tmp_path, change):
    data = (f"{home / 'text.txt'}:1",)
    options = {"load": str(home / "qwen2"), "save": str(tmp_path / "cut"), "data": data, **TEXT_OPTIONS, **CUT}
    killed(ranks(1), "prune", options, "refit", 2)
    filed = prune(ranks(1), home, tmp_path / "cut", data=data, **{**CUT, **change})
    prune(ranks(1), home, tmp_path / "alone", data=data, **{**CUT, **change})
    assert filed[-1] == "refit/outer" and "refit/layer_0000" in filed
    for name in ("cut", "alone"):
        export(ExportOptions(load=str(tmp_path / name), save=str(tmp_path / f"{name}_hf")), World())
    ours, theirs = (state_dict(tmp_path / f"{name}_hf") for name in ("cut", "alone"))
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[key], theirs[key]) for key in ours)


def test_layers_re_fitted_by_other_scores_or_on_another_text_are_not_used(home, ranks, tmp_path):
    """Of scores and text, what counts is what they hold, not what they are called."""

    def score(seed: int) -> None:
        options = score_options(home, tmp_path / "s", metrics=("activation",), overwrite=True, seed=seed)
        assert ranks(1).run(jobs.step_measuring, "score", options) == [(None, LAYERS)]

    score(1)
    given = {"scores": str(tmp_path / "s"), "ffn_hidden_size_remain": 48, "metric": "activation"}
    options = {"load": str(home / "qwen2"), "save": str(tmp_path / "cut"), **TEXT_OPTIONS, **given}
    assert killed(ranks(1), "prune", options, "refit", 2) == ["refit/layer_0000", "refit/layer_0001"]
    score(2)
    assert prune(ranks(1), home, tmp_path / "cut", **given)[:2] == ["refit/layer_0000", "refit/layer_0001"]

    text = tmp_path / "text.txt"
    text.write_text((home / "text.txt").read_text())
    given = {"data": (f"{text}:1",), "ffn_hidden_size_remain": 48, "metric": "activation"}
    options = {"load": str(home / "qwen2"), "save": str(tmp_path / "other"), **TEXT_OPTIONS, **given}
    killed(ranks(1), "prune", options, "refit", 2)
    text.write_text((home / "text.txt").read_text().upper())
    assert prune(ranks(1), home, tmp_path / "other", **given)[0] == "layer_0000"
