"""Bad input: exit code 2, a message that names the problem, nothing written, before any collective."""

from __future__ import annotations

import json
import os
import pickle
import re
import shutil
import subprocess
import sys
from argparse import Namespace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from megatron_prune.cli.main import main
from megatron_prune.errors import InputError
from megatron_prune.runtime.world import World
from megatron_prune.steps.convert import ConvertOptions, convert
from megatron_prune.steps.evaluate import EvaluateOptions, evaluate
from megatron_prune.steps.prune import PruneOptions, prune
from megatron_prune.steps.verify import VerifyOptions, verify

TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone"]


class Deaf(World):
    """One of several ranks, where every collective is a failure of the test."""

    def connect(self, **_):
        raise AssertionError("a process group was started")

    def all_gather(self, value):
        raise AssertionError("a collective was reached")


def contents(root: Path) -> dict[str, tuple]:
    """Every path under ``root`` with what tells whether it was touched."""
    return {str(p): (p.lstat().st_mtime_ns, p.lstat().st_size, p.is_dir()) for p in sorted(root.rglob("*"))}


@pytest.fixture
def refused(tmp_path, capsys):
    """``refused("prune --load …", "pattern")``: exit code 2, a message with the pattern, ``tmp_path`` as it was."""

    def check(argv: list, *patterns: str) -> str:
        before = contents(tmp_path)
        capsys.readouterr()
        with pytest.raises(SystemExit) as left:
            main([str(word) for word in argv])
        message = capsys.readouterr().err
        assert left.value.code == 2, message
        assert "Traceback" not in message
        for pattern in patterns:
            assert re.search(pattern, message, re.DOTALL), f"{pattern!r} is not in:\n{message}"
        assert contents(tmp_path) == before
        return message

    return check


@pytest.fixture(scope="module")
def shared(tiny, tmp_path_factory):
    """Checkpoints that no test changes: qwen2 (12 heads in 6 groups) at TP 1, and a llama of 12 groups."""
    home = tmp_path_factory.mktemp("shared")
    for name in ("qwen2", "llama"):
        convert(ConvertOptions(load=str(tiny(name)), save=str(home / name)), World())
    legacy = {"ckpt_format": "torch", "target_tensor_parallel_size": 2}
    convert(ConvertOptions(load=str(tiny("qwen2")), save=str(home / "legacy"), **legacy), World())
    return home


@pytest.fixture
def hf(tiny, tmp_path) -> Path:
    """A Hugging Face directory to damage."""
    return Path(shutil.copytree(tiny("qwen2"), tmp_path / "hf"))


# ---------------------------------------------------------------------------------------------------------- the request

SHAPES = {
    "--hidden-size-remain 0": "hidden_size_remain 0 is not a positive",
    "--hidden-size-remain 49": "hidden_size_remain 49 is larger than the model's 48",
    "--ffn-hidden-size-remain -3": "ffn_hidden_size_remain -3 is not a positive",
    "--ffn-hidden-size-remain 97": "97 is larger than the model's 96",
    "--num-attention-heads-remain 0": "num_attention_heads_remain 0 is not a positive",
    "--num-attention-heads-remain 13": "13 is larger than the model's 12",
    "--num-query-groups-remain 0": "num_query_groups_remain 0 is not a positive",
    "--num-query-groups-remain 7": "7 is larger than the model's 6",
    "--num-layers-remain 0": "num_layers_remain 0 is not a positive",
    "--num-layers-remain 5": "5 is larger than the model's 4",
    "--hidden-size-remain 0 --ffn-hidden-size-remain 97": "hidden_size_remain 0.*ffn_hidden_size_remain 97",  # all at once
    "--hidden-size-remain 32.5": "32.5",
    "--hidden-size-remain many": "many",
    "--num-attention-heads-remain 7": r"num_attention_heads_remain 7.*12 heads in 6 KV groups.*6, .*12",
    "--num-attention-heads-remain 6 --num-query-groups-remain 4": "heads_remain 6 with num_query_groups_remain 4.*4, 8",
    "--num-attention-heads-remain 9 --num-query-groups-remain 3": r"9 with num_query_groups_remain 3.*3, 6",
    "--drop-layers 4": "names layer 4, needed 0 to 3",
    "--drop-layers=-1": "names layer -1, needed 0 to 3",
    "--drop-layers 1,2,1": "names layer 1 twice",
    "--drop-layers 0,1,2,3": "leaves no layer",
    "--drop-layers 1;2": "1;2.*7,13",
    "--drop-layers 1 --num-layers-remain 2": "num_layers_remain 2 and drop_layers, which leaves 3",
    "": "nothing to prune",
    "--hidden-size-remain 48": "nothing to prune",
    "--hidden-size-remain 36 --prune-type unfair": "unfair.*balance.*global.*unbalance",
    "--hidden-size-remain 36 --metric beauty": "beauty.*magnitude.*random",
    "--hidden-size-remain 36 --hidden-size-remian 30": "--hidden-size-remian is no flag",
    "--hidden-size-remain 36 --num-layers 5": "--num-layers 5, the checkpoint has 4",
    "--hidden-size-remain 36 --hidden-size 64 --swiglu --ffn-hidden-size 96": "--hidden-size 64, the checkpoint has 48",
    "--hidden-size-remain 36 --target-family mistral": "target-family mistral.*qwen2",
    "--hidden-size-remain 36 --target-family gpt2": "gpt2",
    "--hidden-size-remain 36 --tensor-model-parallel-size 2": "1 process for TP 2 × PP 1.*nproc-per-node 2",
    "--hidden-size-remain 36 --tensor-model-parallel-size 0": "tensor.*0.*positive",
    f"--hidden-size-remain 36 --plan {__file__}": "--plan and --hidden-size-remain",
    "--plan nowhere.json": "nowhere.json",
}


@pytest.mark.parametrize("words", SHAPES)
def test_a_request_that_does_not_fit_the_model(shared, tmp_path, refused, words):
    refused(["prune", "--load", shared / "qwen2", "--save", tmp_path / "out", *words.split()], SHAPES[words])


def test_a_model_of_the_other_kind_is_answered_with_what_makes_one_and_what_takes_it(shared, tiny, tmp_path, refused):
    hf, checkpoint = tiny("qwen2"), shared / "qwen2"
    for verb, more in (("prune", ["--ratio", 0.2]), ("export", []), ("transfer", []), ("sample", [])):
        words = [verb, hf, "--save", tmp_path / "out.safetensors", *more]
        assert "cut" not in refused(
            words, f"a Hugging Face directory.*convert --load {hf}.*as it is, it is taken by score.*prune-hf"
        )
    for verb, more in (("prune-hf", ["--ratio", 0.2]), ("convert", [])):
        for path in (checkpoint, checkpoint / "release", shared / "legacy"):
            refused(
                [verb, path, "--save", tmp_path / "out", *more], f"a Megatron checkpoint.*export --load {path}.*prune.*transfer"
            )


def test_a_file_that_is_no_models_configuration_is_named_for_what_it_is(tmp_path, refused):
    for name, content, said in (
        ("plan.json", {"format": "megatron-prune plan", "version": 3}, "got: a file of 'megatron-prune plan'"),
        ("other.json", {"a": 1}, "got: no model_type"),
    ):
        (tmp_path / name).write_text(json.dumps(content))
        for verb in ("inspect", "estimate"):
            refused([verb, tmp_path / name], f"{name} is no configuration of a model\n  {said}\n  needed: a model's directory")


@pytest.mark.parametrize("verb", ["prune", "prune-hf", "plan"])
def test_nothing_that_is_asked_for_is_answered_with_what_may_be(shared, tiny, tmp_path, refused, monkeypatch, verb):
    monkeypatch.chdir(tmp_path)
    model = tiny("qwen2") if verb == "prune-hf" else shared / "qwen2"
    refused(
        [verb, model, "--save", tmp_path / "out"],
        "nothing to prune.*--ffn-hidden-size-remain.*--ratio.*--vocab-plan.*--ratio 0.25",
    )


@pytest.mark.parametrize(
    "text, message",
    [
        (["--data", "nosuch"], "unknown data 'nosuch'"),
        (["--data", "./nosuch.txt"], "no file or folder ./nosuch.txt"),
        (["--seq-length", 65], "--seq-length.*at most the model's 64"),
        (["--nsamples", 0], "nsamples"),
    ],
)
@pytest.mark.parametrize("verb", ["prune", "score", "plan"])
def test_text_that_does_not_fit_is_refused_before_anything_is_announced(shared, tmp_path, refused, verb, text, message):
    asked = [] if verb == "score" else ["--ratio", 0.2]
    said = refused([verb, shared / "qwen2", "--save", tmp_path / "out", *asked, *text], message)
    assert "to be cut" not in said and "steps:" not in said


def test_a_family_that_is_mistyped_is_answered_with_the_nearest(shared, tmp_path, refused):
    words = ["prune", shared / "llama", "--save", tmp_path / "out", "--ratio", 0.2, "--target-family", "mistrall"]
    refused(words, "mistrall; did you mean mistral.*a llama model")


def test_flags_that_are_missing_verbs_that_do_not_exist(tmp_path, refused):
    refused(["prune", "--save", tmp_path / "out"], "--load")
    refused(["convert", "--load-dir", tmp_path], "--save is needed")
    refused(["shrink"], "shrink.*convert.*export")
    refused([])


@pytest.mark.parametrize(
    "tp, pp, options, message",
    [
        (3, 1, {"num_query_groups_remain": 4}, r"num_query_groups_remain 4 .*3 ranks; legal: \[3, 6\]"),
        (3, 1, {"num_attention_heads_remain": 8}, r"num_attention_heads_remain 8 .*3 ranks; legal: \[3, 6, 9, 12\]"),
        (3, 1, {"ffn_hidden_size_remain": 50}, "ffn_hidden_size_remain 50 .*3 ranks; legal: multiples of 3 up to 96"),
        (2, 1, {"ffn_hidden_size_remain": 51, "prune_type": "global"}, "51 .*2 ranks"),
        (2, 1, {"num_query_groups_remain": 3, "prune_type": "global"}, "3 KV groups"),
        (
            12,
            1,
            {"num_attention_heads_remain": 6, "num_query_groups_remain": 6},
            "6 KV groups do not divide over 12.*--prune-type global",
        ),
        (1, 2, {"drop_layers": (0,)}, r"3 layers do not divide over 2 pipeline stages; legal: \[2, 4\]"),
        (5, 1, {"ffn_hidden_size_remain": 50}, r"12 attention heads do not divide over 5.*out of \[1, 2, 3, 6, 12\]"),
        (1, 3, {"ffn_hidden_size_remain": 50}, "4 layers do not divide over 3"),
    ],
)
def test_a_request_that_does_not_divide_over_the_ranks_is_refused_before_any_collective(
    shared, tmp_path, tp, pp, options, message
):
    run = PruneOptions(
        load=str(shared / "qwen2"),
        save=str(tmp_path / "out"),
        save_plan=str(tmp_path / "plan.json"),
        tensor_model_parallel_size=tp,
        pipeline_model_parallel_size=pp,
        **options,
    )
    for rank in (0, tp * pp - 1):
        with pytest.raises(InputError, match=re.compile(message, re.DOTALL)):
            prune(run, Deaf(rank, tp * pp, rank))
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("size", [3, 5])
def test_a_rank_count_that_does_not_fit_is_refused_before_any_collective_by_every_verb_that_runs_the_model(
    shared, tiny, tmp_path, size
):
    (tmp_path / "text").write_text("words " * 50)
    before, load = contents(tmp_path), str(shared / "legacy")
    for step, options in (
        (prune, PruneOptions(load=load, save=str(tmp_path / "out"), ffn_hidden_size_remain=48)),
        (verify, VerifyOptions(load=load, hf_dir=str(tiny("qwen2")))),
        (evaluate, EvaluateOptions(load=load, data=str(tmp_path / "text"), seq_length=8, output=str(tmp_path / "out.json"))),
    ):
        with pytest.raises(InputError, match=re.compile(f"{size} processes for TP 2 × PP 1.*multiple of 2", re.DOTALL)):
            step(options, Deaf(0, size, 0))
    assert contents(tmp_path) == before


def test_a_hidden_size_that_the_hugging_face_class_cannot_say_names_the_class_that_can(shared, tmp_path, refused):
    words = ["prune", "--load", shared / "llama", "--save", tmp_path / "out", "--hidden_size_remain", 40]
    refused(words, "LlamaForCausalLM cannot express hidden_size 40 with 12.*36.*--target-family mistral")


@pytest.mark.parametrize(
    "text, message",
    [
        ("", "sizes.json is not JSON.*name a JSON file of hidden_size_remain"),
        ('{"width": 36}', "width.*hidden_size_remain"),
        ('{"hidden_size_remain": "36"}', "hidden_size_remain"),
        ('{"hidden_size_remain": true}', "hidden_size_remain"),
        ('{"drop_layers": 1}', "drop_layers"),
        ('{"drop_layers": [9]}', "layer 9"),
        ('{"hidden_size_remain": 400}', "400 is larger"),
        ("[36]", "needed: an object"),
    ],
)
def test_a_prune_config_that_is_not_one(tiny, tmp_path, refused, text, message):
    (tmp_path / "sizes.json").write_text(text)
    words = ["prune-hf", "--model_name_or_path", tiny("qwen2"), "--output_path", tmp_path / "out"]
    refused([*words, "--prune_config_path", tmp_path / "sizes.json"], message)


# ------------------------------------------------------------------------------------------------------------- the plan


@pytest.fixture(scope="module")
def plan(shared, tmp_path_factory) -> dict:
    """A plan for ``shared/qwen2`` as JSON data."""
    home = tmp_path_factory.mktemp("plan")
    sizes = {"hidden_size_remain": 36, "ffn_hidden_size_remain": 60, "num_query_groups_remain": 4, "drop_layers": (3,)}
    places = {"load": str(shared / "qwen2"), "save": str(home / "out"), "save_plan": str(home / "plan.json")}
    prune(PruneOptions(**places, metric="random", **sizes), World())
    return json.loads((home / "plan.json").read_text())


def _first(plan: dict) -> dict:
    return plan["layers"][0]


EDITS = {
    "a unit twice": (lambda p: p["hidden"].__setitem__(1, p["hidden"][0]), "hidden: a unit stands twice"),
    "a unit out of range": (lambda p: _first(p)["ffn"].__setitem__(-1, 96), r"layer 0: ffn: \[96\] out of range"),
    "a negative unit": (lambda p: p["hidden"].__setitem__(0, -1), r"hidden: \[-1\] out of range"),
    "a unit too few": (lambda p: _first(p)["ffn"].pop(), "layer 0: ffn: 59 units, the new shape says 60"),
    "all where fewer are due": (lambda p: p.update(hidden="all"), "hidden.*keeps 48 units, the new shape says 36"),
    "a layer out of range": (lambda p: p["layers"][-1].update(layer=7), r"layers: \[7\] out of range"),
    "a layer twice": (lambda p: p["layers"][-1].update(layer=0), "layers: a unit stands twice"),
    "layers out of order": (lambda p: p["layers"].reverse(), "ascending"),
    "a query head of another group": (lambda p: _first(p)["head"].reverse(), "layer 0: head must list 2 query heads"),
    "another old shape": (lambda p: p["old"].update(hidden_size=64), "hidden_size 64, the checkpoint has 48"),
    "a size left out": (lambda p: p["new"].pop("kv_channels"), "plan.json: new.*needed: exactly num_layers"),
    "another head dimension": (lambda p: p["new"].update(kv_channels=4), "kv_channels cannot change"),
    "a size that is no number": (lambda p: p["new"].update(hidden_size="36"), "36"),
    "a head untied that is untied": (lambda p: p.update(untied=True), "a matrix of its own, which it is already"),
    "a rotation to more channels": (
        lambda p: (p.update(hidden="rotated"), p["new"].update(hidden_size=50)),
        "rotates the stream and keeps 50 channels of 48",
    ),
    "no layers": (lambda p: p.update(layers=[]), "layers: 0 units"),
    "a unit that is no number": (lambda p: p["hidden"].__setitem__(0, "0"), "plan.json: hidden.0\n  got: '0'"),
    "an unknown key": (lambda p: p.update(colour="red"), "plan.json: colour.*no field of that name"),
    "an unknown key in a layer": (lambda p: _first(p).update(colour="red"), "layers.0.colour"),
    "another version": (lambda p: p.update(version=3), "version 3"),
    "another format": (lambda p: p.update(format="x"), 'something else.*needed: "format": "megatron-prune plan"'),
    "another model": (lambda p: p.update(content_id="xxh3-sha256:0"), "made from another model.*content_id.*null"),
    "shards that do not add up": (lambda p: _first(p).update(shards={"ffn": [1]}), "do not add up to 60"),
}


@pytest.mark.parametrize("edit", EDITS)
def test_a_plan_that_does_not_fit_the_checkpoint(shared, plan, tmp_path, refused, edit):
    change, message = EDITS[edit]
    edited = json.loads(json.dumps(plan))
    change(edited)
    (tmp_path / "plan.json").write_text(json.dumps(edited))
    refused(["prune", "--load", shared / "qwen2", "--save", tmp_path / "out", "--plan", tmp_path / "plan.json"], message)


@pytest.mark.parametrize("text", ["", "null", "[]", '{"format"', "\x00\xff"])
def test_a_plan_that_is_no_json_object(shared, tmp_path, refused, text):
    (tmp_path / "plan.json").write_bytes(text.encode("latin-1"))
    words = ["prune", "--load", shared / "qwen2", "--save", tmp_path / "out", "--plan", tmp_path / "plan.json"]
    refused(words, re.escape(str(tmp_path / "plan.json")))


# ------------------------------------------------------------------------------------------- the Hugging Face directory


def edit_weights(hf: Path, change) -> None:
    tensors = load_file(hf / "model.safetensors")
    change(tensors)
    save_file(tensors, hf / "model.safetensors", {"format": "pt"})


def edit_json(path: Path, **changes) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


UP = "model.layers.2.mlp.up_proj.weight"
DAMAGES = {
    "a truncated file": (lambda hf: os.truncate(hf / "model.safetensors", 100_000), "model.safetensors is not a whole"),
    "a truncated header": (lambda hf: os.truncate(hf / "model.safetensors", 100), "model.safetensors is not a whole"),
    "an empty file": (lambda hf: os.truncate(hf / "model.safetensors", 0), "model.safetensors is not a whole"),
    "no weights": (lambda hf: (hf / "model.safetensors").unlink(), "has no weights"),
    "a missing tensor": (lambda hf: edit_weights(hf, lambda t: t.pop(UP)), f"{UP}: missing"),
    "an extra tensor": (lambda hf: edit_weights(hf, lambda t: t.update(extra=torch.ones(2))), "extra: not a tensor"),
    "a missing and an extra tensor": (
        lambda hf: edit_weights(hf, lambda t: t.update(upp=t.pop(UP))),
        f"{UP}: missing.*upp: not a tensor",
    ),
    "a wrong shape": (
        lambda hf: edit_weights(hf, lambda t: t.update({UP: t[UP][:-1].clone()})),
        rf"{UP}: shape \(95, 48\), needed \(96, 48\)",
    ),
    "a transposed tensor": (lambda hf: edit_weights(hf, lambda t: t.update({UP: t[UP].T.contiguous()})), f"{UP}: shape"),
    "whole numbers": (lambda hf: edit_weights(hf, lambda t: t.update({UP: t[UP].to(torch.int8)})), f"{UP}: dtype int8"),
    "more layers than config.json says": (
        lambda hf: edit_json(hf / "config.json", num_hidden_layers=3, layer_types=["full_attention"] * 3),
        "layers.3.*not a tensor",
    ),
    "no config.json": (lambda hf: (hf / "config.json").unlink(), "has no config.json"),
    "a config.json that is no JSON": (lambda hf: (hf / "config.json").write_text("{"), "config.json is not JSON"),
    "another family": (lambda hf: edit_json(hf / "config.json", model_type="gpt2"), "gpt2.*llama.*qwen2"),
    "a quantized model": (lambda hf: edit_json(hf / "config.json", quantization_config={"bits": 4}), "quantization_config"),
    "a size that is no number": (lambda hf: edit_json(hf / "config.json", hidden_size="48"), "hidden_size.*48"),
    "a fractional size": (
        lambda hf: edit_json(hf / "config.json", intermediate_size=96.5),
        "(ffn_hidden|intermediate)_size.*96.5",
    ),
    "no heads": (lambda hf: edit_json(hf / "config.json", num_attention_heads=0), "num_attention_heads.*0"),
    "KV groups that do not divide the heads": (
        lambda hf: edit_json(hf / "config.json", num_key_value_heads=5),
        "12 heads, 5 groups",
    ),
    "an unknown rope scaling": (
        lambda hf: edit_json(hf / "config.json", rope_parameters={"rope_type": "yarn", "factor": 2.0}),
        "rope_parameters.*yarn",
    ),
    "a rope scaling without a factor": (
        lambda hf: edit_json(hf / "config.json", rope_parameters={"rope_type": "linear", "rope_theta": 1e4}),
        "ro(pe|tary).*factor",
    ),
    "an activation that is not SiLU": (lambda hf: edit_json(hf / "config.json", hidden_act="gelu"), "hidden_act.*gelu"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_hugging_face_directory(hf, tmp_path, refused, damage):
    harm, message = DAMAGES[damage]
    harm(hf)
    (tmp_path / "plan.json").touch()
    refused(["convert", "--load-dir", hf, "--save-dir", tmp_path / "out"], message)
    refused(
        ["prune-hf", "--model_name_or_path", hf, "--output_path", tmp_path / "out", "--plan", tmp_path / "plan.json"], message
    )


def _sharded(tiny, tmp_path) -> tuple[Path, dict]:
    hf = Path(shutil.copytree(tiny("mistral", shard="60KB"), tmp_path / "sharded"))
    return hf, json.loads((hf / "model.safetensors.index.json").read_text())


@pytest.mark.parametrize("name", ["../{}", "/etc/passwd", "deeper/../../{}", "..", ""])
def test_an_index_that_names_a_file_outside_its_directory(tiny, tmp_path, refused, name):
    hf, index = _sharded(tiny, tmp_path)
    tensor, file = next(iter(index["weight_map"].items()))
    shutil.copy(hf / file, tmp_path / file)
    index["weight_map"][tensor] = name.format(file)
    (hf / "model.safetensors.index.json").write_text(json.dumps(index))
    refused(["convert", "--load-dir", hf, "--save-dir", tmp_path / "out"], "index.json names a file outside its directory")


@pytest.mark.parametrize(
    "kind", ["a file gone", "a file truncated", "a tensor in another file", "a tensor it does not name", "no map"]
)
def test_an_index_that_does_not_match_its_files(tiny, tmp_path, refused, kind):
    hf, index = _sharded(tiny, tmp_path)
    files = sorted(set(index["weight_map"].values()))
    tensor = next(name for name, file in index["weight_map"].items() if file == files[0])
    messages = {
        "a file gone": f"{files[1]}: missing",
        "a file truncated": f"{files[1]} is not a whole safetensors file",
        "a tensor in another file": tensor,
        "a tensor it does not name": tensor,
        "no map": "index.json: weight_map",
    }
    if kind == "a file gone":
        (hf / files[1]).unlink()
    elif kind == "a file truncated":
        os.truncate(hf / files[1], 20_000)
    elif kind == "a tensor in another file":
        index["weight_map"][tensor] = files[1]
    elif kind == "a tensor it does not name":
        index["weight_map"].pop(tensor)
    else:
        index.pop("weight_map")
    (hf / "model.safetensors.index.json").write_text(json.dumps(index))
    refused(["convert", "--load-dir", hf, "--save-dir", tmp_path / "out"], messages[kind])


@pytest.mark.parametrize("value, word", [(float("nan"), "NaN"), (float("inf"), "infinity"), (float("-inf"), "infinity")])
def test_nan_and_infinity_are_a_warning_with_the_tensors_name_and_an_error_with_strict(
    hf, tmp_path, refused, capsys, value, word
):
    edit_weights(hf, lambda tensors: tensors[UP].view(-1).__setitem__(1234, value))
    name = rf"layer 2 up holds {word}"
    refused(["convert", "--load-dir", hf, "--save-dir", tmp_path / "out", "--strict"], name)
    main(["convert", "--load-dir", str(hf), "--save-dir", str(tmp_path / "out")])
    assert re.search(name, capsys.readouterr().err)
    refused(["export", "--load-dir", tmp_path / "out", "--save-dir", tmp_path / "back", "--strict"], name)
    refused(["transfer", "--load-dir", tmp_path / "out", "--save-dir", tmp_path / "back", "--strict"], name)
    words = ["--load", tmp_path / "out", "--save", tmp_path / "cut", "--save-plan", tmp_path / "plan.json", "--strict"]
    refused(["prune", *words, "--metric", "random", "--ffn_hidden_size_remain", 60], name)
    refused(["prune", *words, "--ffn_hidden_size_remain", 60, "--nsamples", 2, "--seq-length", 16], name)  # before it samples
    (tmp_path / "text").write_text(200 * "a small text ")
    refused(
        ["evaluate", "--load-dir", tmp_path / "out", "--data", tmp_path / "text", "--seq-length", 16],
        "loss .*not finite.*inspect",
    )
    for model in (hf, tmp_path / "out"):
        capsys.readouterr()
        main(["inspect", str(model), "--weights", "--json"])
        assert json.loads(capsys.readouterr().out)["unsound_weights"] == {"layer 2 up": word}
    words = ["--model_name_or_path", hf, "--output_path", tmp_path / "o", "--data", f"{tmp_path / 'text'}:1"]
    with pytest.raises(SystemExit) as left:
        main([str(word) for word in ["prune-hf", *words, "--ffn_hidden_size_remain", 60, "--nsamples", 2, "--seq-length", 16]])
    assert left.value.code == 2 and "model.layers.2.mlp.up_proj.weight" in capsys.readouterr().err
    main(["export", "--load-dir", str(tmp_path / "out"), "--save-dir", str(tmp_path / "back")])
    assert (tmp_path / "back/model.safetensors").read_bytes() == (hf / "model.safetensors").read_bytes()


def test_a_value_too_large_for_the_target_dtype_is_named(hf, tmp_path, refused):
    edit_weights(hf, lambda tensors: tensors[UP].view(-1).__setitem__(0, 1e6))
    words = ["convert", "--load-dir", hf, "--save-dir", tmp_path / "out", "--target-params-dtype", "fp16", "--strict"]
    refused(words, "layer 2 up holds .*too large for torch.float16")


@pytest.mark.parametrize(
    "words, message",
    [
        ("--target-tensor-parallel-size 5", r"12 attention heads do not divide over 5.*\[1, 2, 3, 6, 12\]"),
        ("--target-tensor-parallel-size 4", "6 KV groups neither divide over 4 ranks"),
        ("--target-tensor-parallel-size 0", "--target-tensor-parallel-size: 0 is not a positive"),
        ("--target-pipeline-parallel-size 3", "4 layers do not divide over 3 pipeline stages"),
        ("--target-pipeline-parallel-size -1", "--target-pipeline-parallel-size: -1 is not a positive"),
        ("--make-vocab-size-divisible-by 0", "--make-vocab-size-divisible-by: 0 is not a positive"),
        ("--target-params-dtype int8", "int8.*fp32.*bf16.*fp16"),
        ("--ckpt-format zarr", "zarr.*torch_dist"),
    ],
)
def test_a_conversion_that_cannot_be(tiny, tmp_path, refused, words, message):
    refused(["convert", "--load-dir", tiny("qwen2"), "--save-dir", tmp_path / "out", *words.split()], message)


# ------------------------------------------------------------------------------------------------------------ the output


def test_an_existing_output_directory_needs_overwrite_at_every_verb(shared, tiny, tmp_path, refused):
    (tmp_path / "out").mkdir()
    (tmp_path / "out/precious").write_text("kept")
    (tmp_path / "sizes.json").write_text('{"hidden_size_remain": 36}')
    for words in (
        ["convert", "--load-dir", tiny("qwen2"), "--save-dir"],
        ["export", "--load-dir", shared / "qwen2", "--save-dir"],
        ["transfer", "--load-dir", shared / "qwen2", "--save-dir"],
        ["prune", "--load", shared / "qwen2", "--hidden_size_remain", 36, "--save"],
        ["prune-hf", "--model_name_or_path", tiny("qwen2"), "--prune_config_path", tmp_path / "sizes.json", "--output_path"],
    ):
        refused([*words, tmp_path / "out"], "output .*out exists.*--overwrite")
        refused([*words, tmp_path / "out/precious"], "output .*precious.*a file")
        refused([*words, tmp_path / "out/precious/deeper"], "precious")
        refused([*words, tmp_path / "out", "--overwrite"], "output .*out is not replaced.*got: precious.*what to do")
    (tmp_path / "out/precious").unlink()
    words = ["convert", "--load-dir", str(tiny("qwen2")), "--save-dir", str(tmp_path / "out")]
    main(words)
    main([*words, "--target-tensor-parallel-size", "2", "--overwrite"])
    assert (tmp_path / "out/release/__1_0.distcp").exists() and sorted(os.listdir(tmp_path)) == ["out", "sizes.json"]


def test_a_plan_file_that_cannot_be_written_is_noticed_before_the_work(shared, tmp_path, refused):
    (tmp_path / "folder").mkdir()
    words = ["prune", "--load", shared / "qwen2", "--save", tmp_path / "out", "--hidden_size_remain", 36]
    refused([*words, "--save-plan", tmp_path / "folder"], "output .*folder.*got: a directory.*needed: a regular file")


# ------------------------------------------------------------------------------------------------- the Megatron checkpoint

FILES = {
    "qwen2": [".metadata", "metadata.json", "common.pt", "__0_0.distcp", "megatron_prune.json"],
    "legacy": ["mp_rank_00/model_optim_rng.pt", "mp_rank_01/model_optim_rng.pt", "megatron_prune.json"],
}
EVERY_FILE = [(name, file) for name, files in FILES.items() for file in files]


@pytest.mark.parametrize("name, file", EVERY_FILE)
@pytest.mark.parametrize("damage", ["gone", "half", "empty"])
def test_an_incomplete_checkpoint_directory(shared, tmp_path, refused, name, file, damage):
    path = Path(shutil.copytree(shared / name, tmp_path / "m")) / "release" / file
    assert path.is_file()
    if damage == "gone":
        path.unlink()
    else:
        os.truncate(path, path.stat().st_size // 2 if damage == "half" else 0)
    for words in (
        ["export", "--load-dir", tmp_path / "m", "--save-dir", tmp_path / "out"],
        ["transfer", "--load-dir", tmp_path / "m/release", "--save-dir", tmp_path / "out"],
        ["prune", "--load", tmp_path / "m", "--save", tmp_path / "out", "--ffn_hidden_size_remain", 48],
    ):
        refused(words, re.escape(Path(file).name) + "|mp_rank_0|" + re.escape(str(tmp_path / "m")))


def test_a_rank_folder_gone_and_a_rank_folder_too_many(shared, tmp_path, refused):
    folder = Path(shutil.copytree(shared / "legacy", tmp_path / "m")) / "release"
    shutil.copytree(folder / "mp_rank_01", folder / "mp_rank_02")
    refused(["export", "--load-dir", tmp_path / "m", "--save-dir", tmp_path / "out"], "mp_rank_02: more ranks than TP 2")
    shutil.rmtree(folder / "mp_rank_02")
    shutil.rmtree(folder / "mp_rank_01")
    refused(["export", "--load-dir", tmp_path / "m", "--save-dir", tmp_path / "out"], "mp_rank_01.*missing")


@pytest.mark.parametrize(
    "text, message", [("7", "iter_0000007"), ("latest", "'latest'.*release"), ("../x", r"'\.\./x'"), (None, "not a Megatron")]
)
def test_a_tracker_that_names_nothing(shared, tmp_path, refused, text, message):
    tracker = Path(shutil.copytree(shared / "qwen2", tmp_path / "m")) / "latest_checkpointed_iteration.txt"
    tracker.unlink() if text is None else tracker.write_text(text)
    refused(["export", "--load-dir", tmp_path / "m", "--save-dir", tmp_path / "out"], message)


@pytest.mark.parametrize(
    "words, message",
    [
        ("export --load-dir {m} --save-dir {t}/out --max-shard-size big", "max-shard-size.*big"),
        ("export --load-dir {m} --save-dir {t}/out --max-shard-size 0", "max-shard-size"),
        ("export --load-dir {m} --save-dir {t}/out --hf-dir {t}/none", "none"),
        ("export --load-dir {t}/none --save-dir {t}/out", "none: no such file or directory"),
        ("convert --load-dir {t}/none --save-dir {t}/out", "no such model directory.*none"),
        (
            "transfer --load-dir {m} --save-dir {t}/out --target-tensor-parallel-size 5",
            r"do not divide over 5.*\[1, 2, 3, 6, 12\]",
        ),
        ("evaluate --load-dir {m} --data {t}/none --seq-length 8", "none"),
        ("evaluate --load-dir {m} --data {m}/latest_checkpointed_iteration.txt --seq-length 60", "too short.*at least 60"),
        ("evaluate --load-dir {m} --data {m}/latest_checkpointed_iteration.txt --seq-length 65", "65.*at most the model's 64"),
        ("evaluate --load-dir {m} --data {m}/latest_checkpointed_iteration.txt --windows 0", "windows.*0.*positive"),
        ("verify --load-dir {m} --hf-dir {llama}", "num_query_groups: the checkpoint has"),
        ("verify --load-dir {m} --hf-dir {t}/none", "none"),
    ],
)
def test_arguments_that_do_not_fit_a_megatron_checkpoint(shared, tiny, tmp_path, refused, words, message):
    refused(words.format(m=shared / "qwen2", t=tmp_path, llama=tiny("llama")).split(), message)


# ----------------------------------------------------------------------------------------------------------- no pickle runs


class Bomb:
    """Creates a file when it is unpickled."""

    def __init__(self, mark: Path):
        self.mark = mark

    def __reduce__(self):
        return os.mkdir, (str(self.mark),)


@pytest.mark.parametrize("file", ["pytorch_model.bin", "common.pt", ".metadata", "__0_0.distcp", "model_optim_rng.pt"])
def test_a_pickle_from_outside_is_never_executed(shared, hf, tmp_path, refused, file):
    bomb, mark = {"model": Bomb(tmp_path / "mark"), "args": Bomb(tmp_path / "mark")}, tmp_path / "mark"
    words = ["export", "--load-dir", tmp_path / "m", "--save-dir", tmp_path / "out"]
    if file == "pytorch_model.bin":
        (hf / "model.safetensors").unlink()
        torch.save(bomb, hf / file)
        words = ["convert", "--load-dir", hf, "--save-dir", tmp_path / "out"]
    elif file == "model_optim_rng.pt":
        shutil.copytree(shared / "legacy", tmp_path / "m")
        torch.save(bomb, tmp_path / "m/release/mp_rank_01" / file)
    else:
        release = Path(shutil.copytree(shared / "qwen2", tmp_path / "m")) / "release"
        if file == ".metadata":
            (release / file).write_bytes(pickle.dumps(bomb))
        elif file == "common.pt":
            torch.save({"args": Namespace(x=bomb)}, release / file)
        else:
            size = (release / file).stat().st_size
            torch.save(bomb, release / file)
            os.truncate(release / file, size)
    refused(words, re.escape(file))
    assert not mark.exists()


# ---------------------------------------------------------------------------------------------------------------- torchrun


def launch(size: int, *words) -> subprocess.CompletedProcess:
    """torchrun to its end; a hang would last for the process group's half hour."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [*TORCHRUN, "--nproc-per-node", size, *words]
    return subprocess.run([str(word) for word in command], capture_output=True, text=True, timeout=280, env=environment)


def test_torchrun_with_a_rank_count_that_does_not_fit_says_so_once_with_exit_code_2(shared, tmp_path):
    words = ["--load", shared / "legacy", "--save", tmp_path / "out", "--ffn_hidden_size_remain", 48]
    done = launch(3, Path(__file__).parents[2] / "prune_llama.py", *words)
    assert done.returncode != 0
    assert re.search(r"exitcode\s*: 2\b", done.stderr)
    assert len(re.findall(r"prune_llama.py: 3 processes for TP 2 × PP 1", done.stderr)) == 1
    assert 'Traceback (most recent call last):\n  File "' + str(Path(__file__).parents[2] / "prune_llama.py") not in done.stderr
    assert not list(tmp_path.iterdir())


def test_a_rank_that_fails_in_the_middle_takes_the_others_down_and_its_message_is_shown(tiny, tmp_path):
    words = ["convert", "--load-dir", tiny("qwen2"), "--save-dir", tmp_path / "out", "--target-tensor-parallel-size", 2]
    done = launch(3, Path(__file__).with_name("limited_rank.py"), *words)
    assert done.returncode != 0
    assert re.search(r"out was not written\n.*__._0.distcp: File too large", done.stderr)
    assert not re.search(r"\[rank \d\] Traceback", done.stderr)  # torchrun's own report is one
    assert not list(tmp_path.iterdir())
