"""The way back from checkpoints that are not quite our own, and what a directory says of how it came to be."""

from __future__ import annotations

import json
import re
import shutil

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file
from tiny import TEXT, logits, state_dict

from megatron_prune.checkpoint import megatron, torch_archive
from megatron_prune.checkpoint.manifest import FILE, RECIPE_FILE
from megatron_prune.cli.main import main
from megatron_prune.cli.parser import parse
from megatron_prune.errors import InputError
from megatron_prune.runtime.world import World
from megatron_prune.steps.convert import ConvertOptions, convert
from megatron_prune.steps.evaluate import EvaluateOptions, evaluate
from megatron_prune.steps.export import ExportOptions, export
from megatron_prune.steps.prune import PruneOptions, prune
from megatron_prune.steps.prune_hf import PruneHfOptions, prune_hf
from megatron_prune.steps.verify import VerifyOptions, verify
from megatron_prune.text.windows import draw_windows


def converted(source, target, **changes):
    convert(ConvertOptions(load=str(source), save=str(target), **changes), World())
    return target


def config_of(path) -> dict:
    return json.loads((path / "config.json").read_text())


def test_another_models_config_does_not_bring_its_rope_along(tiny, tmp_path):
    m = converted(tiny("qwen2"), tmp_path / "m")
    other = tiny("qwen2", rope_parameters={"rope_type": "linear", "factor": 4.0, "rope_theta": 777.0})
    export(ExportOptions(load=str(m), save=str(tmp_path / "back"), hf_dir=str(other)), World())
    tokens = torch.arange(20)[None]
    assert torch.equal(logits(tmp_path / "back", tokens), logits(tiny("qwen2"), tokens))


@pytest.mark.parametrize("hf_dir", ["original", "pruned already"])
def test_a_pruned_checkpoint_without_our_manifest_loads_again(tiny, tmp_path, hf_dir):
    m = converted(tiny("qwen3"), tmp_path / "m")
    prune(PruneOptions(load=str(m), save=str(tmp_path / "p"), drop_layers=(1, 2), metric="random"), World())
    export(ExportOptions(load=str(tmp_path / "p"), save=str(tmp_path / "first")), World())
    (tmp_path / "p/release" / FILE).unlink()
    shutil.rmtree(tmp_path / "p/release/hf")
    side = tiny("qwen3") if hf_dir == "original" else tmp_path / "first"
    options = {"load": str(tmp_path / "p"), "save": str(tmp_path / "again"), "hf_dir": str(side)}
    if hf_dir == "original":  # of another shape: the user says that it is of this model all the same
        with pytest.raises(InputError, match="num_layers: the stored arguments say 2, config.json 4"):
            export(ExportOptions(**options), World())
        options["believe"] = "args"
    export(ExportOptions(**options), World())
    tokens = torch.arange(20)[None]
    assert torch.equal(logits(tmp_path / "again", tokens), logits(tmp_path / "first", tokens))


@pytest.mark.parametrize("ckpt_format", ["torch_dist", "torch"])
def test_padding_is_left_out_where_megatrons_args_do_not_tell_the_vocabulary(tiny, tmp_path, monkeypatch, ckpt_format):
    source = tiny("qwen2")
    m = converted(source, tmp_path / "m", target_tensor_parallel_size=2, ckpt_format=ckpt_format)
    (m / "release" / FILE).unlink()
    shutil.rmtree(m / "release/hf")
    read = torch_archive.read_objects

    def without_vocabulary(*arguments, **options):
        content = read(*arguments, **options)
        if isinstance(content, dict) and "args" in content:
            content["args"].vocab_size, content["args"].make_vocab_size_divisible_by = None, 999
        return content

    monkeypatch.setattr(torch_archive, "read_objects", without_vocabulary)
    export(ExportOptions(load=str(m), save=str(tmp_path / "back"), hf_dir=str(source)), World())
    ours, theirs = state_dict(tmp_path / "back"), state_dict(source)
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in theirs)
    options = VerifyOptions(load=str(m), hf_dir=str(source), tensor_model_parallel_size=1)
    assert verify(options, World()) == 0


def test_the_config_names_the_commonest_dtype_on_both_routes(tiny, tmp_path):
    source = tmp_path / "hf"
    shutil.copytree(tiny("qwen2"), source)
    tensors = load_file(source / "model.safetensors")
    tensors["model.embed_tokens.weight"] = tensors["model.embed_tokens.weight"].float()
    save_file(tensors, source / "model.safetensors", metadata={"format": "pt"})
    m = converted(source, tmp_path / "m")
    export(ExportOptions(load=str(m), save=str(tmp_path / "back")), World())
    assert (tmp_path / "back/config.json").read_bytes() == (source / "config.json").read_bytes()
    plan = str(tmp_path / "plan.json")
    prune(
        PruneOptions(load=str(m), save=str(tmp_path / "p"), ffn_hidden_size_remain=48, metric="random", save_plan=plan), World()
    )
    export(ExportOptions(load=str(tmp_path / "p"), save=str(tmp_path / "tp")), World())
    prune_hf(PruneHfOptions(load=str(source), save=str(tmp_path / "hf_route"), plan=plan), World())
    for name in ("config.json", "model.safetensors"):
        assert (tmp_path / "tp" / name).read_bytes() == (tmp_path / "hf_route" / name).read_bytes()


def test_a_pruned_directory_tells_how_it_came_to_be_also_after_another_conversion(tiny, tmp_path, capsys):
    m = converted(tiny("mistral"), tmp_path / "m")
    prune(PruneOptions(load=str(m), save=str(tmp_path / "p"), ffn_hidden_size_remain=48, metric="random"), World())
    export(ExportOptions(load=str(tmp_path / "p"), save=str(tmp_path / "back")), World())
    main(["inspect", str(tmp_path / "back"), "--json"])
    recipe = json.loads(capsys.readouterr().out)["recipe"]
    assert [entry["step"] for entry in recipe] == ["convert", "prune"]
    main(["inspect", str(tmp_path / "back")])
    table, _, below = capsys.readouterr().out.partition("\nrecipe:\n")
    assert re.search("recipe +│ convert, prune +│", table) and max(map(len, table.splitlines())) <= 160
    steps = yaml.safe_load("recipe:\n" + below)["recipe"]
    assert max(map(len, below.splitlines())) <= 140 and "{'" not in below
    for entry, told in zip(recipe, steps, strict=True):
        assert (
            next(iter(told)) == "step" and {key: told[key] for key in entry if key not in ("old", "new")}.items() <= entry.items()
        )
    assert steps[1]["sizes"]["ffn_hidden_size"] == f"{recipe[1]['old']['ffn_hidden_size']} → 48"
    again = megatron.open_checkpoint(converted(tmp_path / "back", tmp_path / "again")).manifest
    assert [entry["step"] for entry in again.recipe] == ["convert", "prune", "convert"]
    assert not (tiny("mistral") / RECIPE_FILE).exists()


def test_a_unit_with_broken_weights_goes_first(tiny, tmp_path):
    source = tmp_path / "hf"
    shutil.copytree(tiny("llama"), source)
    tensors = load_file(source / "model.safetensors")
    tensors["model.layers.2.mlp.gate_proj.weight"][17, 3] = float("nan")
    tensors["model.layers.1.mlp.down_proj.weight"][5, 40] = float("inf")
    save_file(tensors, source / "model.safetensors", metadata={"format": "pt"})
    m = converted(source, tmp_path / "m")
    plan = tmp_path / "plan.json"
    options = PruneOptions(
        load=str(m), save=str(tmp_path / "p"), ffn_hidden_size_remain=95, metric="magnitude", save_plan=str(plan)
    )
    prune(options, World())
    kept = {entry["layer"]: entry["ffn"] for entry in json.loads(plan.read_text())["layers"]}
    assert 17 not in kept[2] and 40 not in kept[1] and len(kept[0]) == 95
    export(ExportOptions(load=str(tmp_path / "p"), save=str(tmp_path / "back"), strict=True), World())


@pytest.mark.parametrize(
    "extra, word",
    [
        (["--plan", "{plan}", "--metric", "magnitude"], "metric"),
        (["--plan", "{plan}", "--prune_type", "global"], "--prune-type"),
        (["--plan", "{plan}", "--drop_layers", "1"], "--drop-layers"),
        (["--ffn_hidden_size_remain", "48", "--save-plan", "{save}"], "is the output"),
        (["--ffn_hidden_size_remain", "48", "--save-plan", "{save}/plan.json"], "lies in it"),
        (["--ffn_hidden_size_remain", "48", "--rotary-percent", "0.5"], "rotary-percent"),
    ],
)
def test_requests_that_contradict_themselves_are_refused(tiny, tmp_path, extra, word):
    m = converted(tiny("llama"), tmp_path / "m")
    plan = tmp_path / "plan.json"
    base = ["--load", str(m), "--save", str(tmp_path / "p")]
    prune(
        parse(
            PruneOptions,
            [*base, "--ffn_hidden_size_remain", "90", "--metric", "random", "--save-plan", str(plan), "--rotary-percent", "1"],
            prog="prune",
        ),
        World(),
    )
    shutil.rmtree(tmp_path / "p")
    words = [part.format(plan=plan, save=tmp_path / "p") for part in extra]
    with pytest.raises(InputError, match=word):
        prune(parse(PruneOptions, [*base, *words], prog="prune"), World())
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["m", "plan.json"]


def test_one_token_has_no_perplexity(tiny, tmp_path):
    m = converted(tiny("llama"), tmp_path / "m")
    with pytest.raises(InputError, match="at least 2"):
        evaluate(EvaluateOptions(load=str(m), data="none", seq_length=1), World())


def test_windows_begin_with_bos_where_a_family_needs_it(tiny, tmp_path):
    hf = tiny("gemma3_text", dtype="float32")
    m, text, output = converted(hf, tmp_path / "m"), tmp_path / "text.txt", tmp_path / "result.json"
    text.write_text(TEXT * 20)
    evaluate(EvaluateOptions(load=str(m), data=str(text), seq_length=16, windows=3, output=str(output)), World())
    tokens = draw_windows(str(text), hf, seq_length=16, count=3).tokens
    assert tokens[:, 0].any()
    tokens[:, 0] = 0  # its BOS
    found = logits(hf, tokens)[:, :-1].flatten(0, 1)
    expected = torch.nn.functional.cross_entropy(found, tokens[:, 1:].flatten()).exp().item()
    assert json.loads(output.read_text())["perplexity"] == pytest.approx(expected, rel=1e-5)


def test_an_estimate_reads_the_file_it_is_given(tmp_path, capsys):
    (tmp_path / "LICENSE").write_text("free")
    with pytest.raises(SystemExit) as left:
        main(["estimate", str(tmp_path / "LICENSE")])
    assert left.value.code == 2 and "LICENSE is not JSON" in capsys.readouterr().err


def test_bad_input_is_told_before_any_process_group_is_joined(monkeypatch, capsys):
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "0")
    left = []
    monkeypatch.setattr("os._exit", lambda code: left.append(code) or (_ for _ in ()).throw(SystemExit(code)))
    with pytest.raises(SystemExit):
        main(["inspect", "nonexistent"])
    assert left == [2] and "nonexistent" in capsys.readouterr().err
