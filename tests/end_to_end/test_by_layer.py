"""Every verb on a model whose layers differ and may lack a block: against its formulas, and under ranks against one process."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path

import oracle
import per_layer
import pytest
import rank_jobs
import torch
from rank_jobs_recovery import recover
from ranks import RankFailed
from recovery_reference import documents, write_pair
from safetensors.torch import load_file
from tiny import TEXT, state_dict

from megatron_prune.arch.tensors import HEAD, TensorId, parameter_count
from megatron_prune.checkpoint import megatron
from megatron_prune.cli.main import main
from megatron_prune.families.family import FAMILIES
from megatron_prune.importance.artifact import load_scores
from megatron_prune.planning.plan import whole_plan
from megatron_prune.runtime.world import World
from megatron_prune.steps.convert import ConvertOptions, convert
from megatron_prune.steps.evaluate import EvaluateOptions, evaluate
from megatron_prune.steps.export import ExportOptions, export
from megatron_prune.steps.prune import PruneOptions, prune
from megatron_prune.steps.score import ScoreOptions, score
from megatron_prune.steps.verify import VerifyOptions, verify
from megatron_prune.steps.vocab_count import VocabCountOptions, vocab_count
from megatron_prune.steps.vocab_trim import VocabTrimOptions, vocab_trim
from megatron_prune.text.windows import draw_windows

MODEL = per_layer.mixed("qwen3")
TP2_PP2 = {"tensor_model_parallel_size": 2, "pipeline_model_parallel_size": 2}


@pytest.fixture(scope="module")
def home(tiny, tmp_path_factory) -> Path:
    """``hf``, ``m`` (its checkpoint of TP 1), ``alike`` (that of a model whose layers are alike) and ``text.txt``."""
    home = tmp_path_factory.mktemp("home")
    beside = tiny("qwen3", dtype="float32")
    per_layer.write_model(home / "hf", MODEL, FAMILIES.get("qwen3"), beside=beside, dtype=torch.float32)
    for source, save in ((home / "hf", home / "m"), (beside, home / "alike")):
        convert(ConvertOptions(load=str(source), save=str(save)), World())
    (home / "text.txt").write_text(TEXT * 30)
    return home


def test_verify_and_evaluate_say_what_the_formulas_do(home, tmp_path):
    assert verify(VerifyOptions(load=str(home / "m"), hf_dir=str(home / "hf")), World()) == 0
    settings = {"seq_length": 32, "windows": 3}
    output = tmp_path / "result.json"
    evaluate(EvaluateOptions(load=str(home / "m"), data=str(home / "text.txt"), output=str(output), **settings), World())
    tokens = draw_windows(str(home / "text.txt"), home / "hf", seq_length=32, count=3).tokens
    found = oracle.logits(*oracle.model_of(home / "m"), tokens)[:, :-1]
    expected = torch.nn.functional.cross_entropy(found.flatten(0, 1), tokens[:, 1:].flatten()).exp().item()
    assert json.loads(output.read_text())["perplexity"] == pytest.approx(expected, rel=1e-5)


def test_perplexity_under_ranks_is_that_of_the_formulas(home, ranks):
    tokens = torch.randint(0, 307, (4, 24), generator=torch.Generator().manual_seed(2))
    found = oracle.logits(*oracle.model_of(home / "m"), tokens)[:, :-1]
    expected = torch.nn.functional.cross_entropy(found.flatten(0, 1), tokens[:, 1:].flatten()).exp().item()
    values = ranks(4).run(rank_jobs.perplexity, str(home / "m"), tokens.tolist(), 2, 2, 2)
    assert values == pytest.approx([expected] * 4, rel=1e-5)


METRICS = ("activation", "angular", "block_influence", "fisher", "fold", "magnitude", "obs", "taylor", "wanda")


def test_scores_under_ranks_are_those_of_one_process_and_of_the_weights(home, ranks, tmp_path):
    options = {"load": str(home / "m"), "data": (str(home / "text.txt"),), "nsamples": 8, "seq_length": 24, "metrics": METRICS}
    score(ScoreOptions(save=str(tmp_path / "one"), **options), World())
    ranks(4).run(rank_jobs.run_steps, ("score", {**options, "save": str(tmp_path / "four"), **TP2_PP2}))
    one, four = (load_file(tmp_path / name / "scores.safetensors") for name in ("one", "four"))
    assert one.keys() == four.keys()
    for key, values in one.items():
        assert torch.allclose(four[key], values, rtol=1e-3, atol=1e-5 * values.abs().max().item()), key
    found, expected = load_scores(tmp_path / "four", "magnitude"), norms(oracle.model_of(home / "m")[1])
    assert found.keys() == expected.keys()
    assert all(torch.allclose(found[key], value, rtol=1e-6) for key, value in expected.items())


def norms(weights: oracle.Model) -> dict[tuple[str, int | None], torch.Tensor]:
    """L2 norm of all weights of every unit, float64."""
    square = {tensor: data.double() ** 2 for tensor, data in weights.items()}
    sums = {("hidden", None): torch.zeros(MODEL.hidden_size).double(), ("layer", None): torch.zeros(MODEL.num_layers).double()}
    for tensor, data in square.items():
        if tensor.layer is not None:
            sums["layer", None][tensor.layer] += data.sum()
        if tensor.role not in ("q_norm", "k_norm"):
            sums["hidden", None] += data.sum(1) if tensor.role in ("o", "down") else data if data.dim() == 1 else data.sum(0)
    for layer in range(MODEL.num_layers):
        own, at = MODEL.of_layer(layer), lambda role: square[TensorId(role, layer)]
        if own.ffn_hidden_size:
            sums["ffn", layer] = at("gate").sum(1) + at("up").sum(1) + at("down").sum(0)
        if own.num_attention_heads:
            by = lambda values, units: values.view(units, -1).sum(1)
            sums["head", layer] = by(at("q").sum(1) + at("o").sum(0), own.num_attention_heads)
            pairs = by(at("k").sum(1) + at("v").sum(1), own.num_query_groups)
            sums["kv_head", layer] = pairs + by(sums["head", layer], own.num_query_groups)
    return {key: value.sqrt() for key, value in sums.items()}


@pytest.mark.parametrize("fold", [False, True])
def test_a_vocabulary_is_trimmed_as_of_any_model(home, ranks, tmp_path, fold):
    """A cut alone leaves the logits of what stays; folding says under ranks what it says in one process."""
    counts = tmp_path / "counts.safetensors"
    counted = {"tokenizer": str(home / "hf"), "input": (str(home / "text.txt"),), "save": str(counts), "workers": 1}
    vocab_count(VocabCountOptions(**counted), World())
    options = {"counts": (str(counts),), "remain_vocab_size": 280, "save_ids": str(tmp_path / "ids.safetensors")}
    if fold:
        options |= {"fold": True, "data": (str(home / "text.txt"),), "nsamples": 12, "seq_length": 24}
    vocab_trim(VocabTrimOptions(load=str(home / "hf"), save=str(tmp_path / "hf"), **options), World())
    config, weights = oracle.model_of(tmp_path / "hf")
    assert config == replace(MODEL, vocab_size=280)
    old, head = oracle.model_of(home / "hf")[1][HEAD], weights[HEAD]
    kept = [int((old == row).all(dim=1).nonzero()) for row in head] if not fold else None
    if fold:
        split = {"load": str(home / "hf"), "save": str(tmp_path / "two"), "target_tensor_parallel_size": 2}
        convert(ConvertOptions(**split), World())
        again = {**options, "load": str(tmp_path / "two"), "save": str(tmp_path / "trimmed"), "save_ids": None}
        ranks(2).run(rank_jobs.run_steps, ("vocab_trim", again))
        other = oracle.model_of(tmp_path / "trimmed")[1][HEAD]
        assert (other - head).abs().max() < 1e-4 * head.abs().max()
        return
    tokens = torch.randint(0, 280, (2, 24), generator=torch.Generator().manual_seed(2))
    expected = oracle.logits(*oracle.model_of(home / "hf"), torch.tensor(kept)[tokens])[..., kept]
    assert (oracle.logits(config, weights, tokens) - expected).abs().max() < 1e-9 * expected.std()


def test_a_budget_is_dealt_out_over_layers_that_differ(home, tmp_path):
    options = {"load": str(home / "m"), "save": str(tmp_path / "out"), "ratio": 0.15, "allocate": "free", "reconstruct": 0}
    prune(PruneOptions(data=(str(home / "text.txt"),), nsamples=8, seq_length=24, **options), World())
    found = oracle.model_of(tmp_path / "out")[0]
    assert 0.8 * parameter_count(MODEL) < parameter_count(found) <= 0.85 * parameter_count(MODEL)


def test_a_plan_becomes_the_shape_alike_with_no_more_than_the_models_own_text(home, tmp_path):
    (tmp_path / "sizes.json").write_text('{"1": {"ffn_hidden_size": 40}, "2": {"num_query_groups": 2}}')
    common, plan = {"load": str(home / "alike")}, str(tmp_path / "plan.json")
    sizes = {"layer_sizes": str(tmp_path / "sizes.json"), "metric": "magnitude", "refit": False}
    prune(PruneOptions(**common, save=str(tmp_path / "differing"), save_plan=plan, **sizes), World())
    text = {"nsamples": 2, "seq_length": 16, "reconstruct": 0}
    prune(PruneOptions(**common, save=str(tmp_path / "twin"), plan=plan, uniform=True, **text), World())
    differing, twin = (oracle.model_of(tmp_path / name)[0] for name in ("differing", "twin"))
    assert twin.is_uniform and not differing.is_uniform
    assert 0.95 * parameter_count(differing) < parameter_count(twin) <= parameter_count(differing)


def test_facts_estimates_and_tables_tell_sizes_by_layer(home, tmp_path, capsys):
    said = lambda *argv: (main([*map(str, argv)]), capsys.readouterr().out)[1]
    sizes = {name: list(getattr(MODEL, name)) for name in ("ffn_hidden_size", "num_attention_heads", "num_query_groups")}
    weights = oracle.model_of(home / "m")[1]
    parameters = sum(data.numel() for data in weights.values())
    for model in ("hf", "m"):
        facts = json.loads(said("inspect", home / model, "--json"))
        assert facts["layers"] == sizes and facts["parameters"] == parameters == parameter_count(MODEL)
        assert facts["tensor_parallel_sizes"] == [1, 2]
    picture = said("inspect", home / "m")
    assert all(f"{size} " in picture for size in (96, 40, 64))
    estimates = json.loads(said("estimate", home / "m", "--json", "--target-tensor-parallel-size", 2))
    assert estimates["parameters"] == estimates["target_parameters"] == parameters
    assert estimates["steps"]["conversion"]["disk"] == pytest.approx(2 * parameters, rel=0.1)
    (tmp_path / "sizes.json").write_text('{"1": {"mlp": "none"}}')
    smaller = json.loads(said("estimate", home / "m", "--json", "--layer-sizes", tmp_path / "sizes.json"))
    mlp = 3 * MODEL.ffn_hidden_size[1] * MODEL.hidden_size + MODEL.hidden_size  # its matrices and its norm
    assert smaller["target_parameters"] == parameters - mlp
    output = tmp_path / "table.json"
    said("compare", "--before", home / "hf", "--after", home / "hf", "--max-new-tokens", 2, "--output", output)
    assert json.loads(output.read_text())["before"].items() >= {**sizes, "parameters": parameters}.items()


def test_an_adapter_is_merged_into_layers_that_have_its_matrices(home, ranks, tmp_path):
    """W + alpha / r · B · A, by export and by transfer; layers without a block have no adapter for it."""
    data = write_pair(tmp_path / "text", documents(20))
    options = {"load": str(home / "m"), "save": str(tmp_path / "run"), "data_path": (data,), "split": "80,10,10"}
    options |= {"seq_length": 16, "global_batch_size": 4, "micro_batch_size": 2, "eval_iters": 1, "train_iters": 2}
    options |= {"lr": 2e-2, "lr_decay_style": "constant"}
    assert ranks(4).run(recover, {**options, "lora_r": 4, "lora_alpha": 12.0, **TP2_PP2}) == [0] * 4
    export(ExportOptions(load=str(tmp_path / "run"), save=str(tmp_path / "peft"), adapter_only=True), World())
    export(ExportOptions(load=str(tmp_path / "run"), save=str(tmp_path / "merged")), World())
    expected, adapter = state_dict(home / "hf"), load_file(tmp_path / "peft" / "adapter_model.safetensors")
    changed = {name.removesuffix(".lora_A.weight") for name in adapter if ".lora_A." in name}
    assert len(changed) == 3 * 4 + 3 * 3  # three layers have attention, three a feed-forward block
    for name in changed:
        key = name.removeprefix("base_model.model.") + ".weight"
        update = 3.0 * adapter[f"{name}.lora_B.weight"] @ adapter[f"{name}.lora_A.weight"]
        assert update.abs().max() > 1e-3
        expected[key] = expected[key] + update
    found = state_dict(tmp_path / "merged")
    assert found.keys() == expected.keys()
    assert all(torch.allclose(found[name], value, atol=1e-6) for name, value in expected.items())
    moved = {"load": str(tmp_path / "run"), "save": str(tmp_path / "moved"), "target_tensor_parallel_size": 2}
    ranks(1).run(rank_jobs.run_steps, ("transfer", moved))
    config, weights = oracle.model_of(tmp_path / "moved")
    exported = oracle.model_of(tmp_path / "merged")[1]
    assert config == MODEL and all(torch.equal(data, exported[tensor]) for tensor, data in weights.items())


# ------------------------------------------------------------------------------------------------------------- bad input

ALL = "0,1,2,3"
UNLIKE = "is not one number for the model: layers differ got: .* in layer 1"
REFUSED = {
    "one size for layers that differ": ("m", ["--ffn_hidden_size_remain", "20"], f"ffn_hidden_size {UNLIKE}"),
    "heads of layers that differ": ("m", ["--num_attention_heads_remain", "6"], f"num_attention_heads {UNLIKE}"),
    "a budget of shapes alike": ("m", ["--ratio", "0.2"], f"{UNLIKE}.*chosen with --allocate free"),
    "a budget and a form that cannot say the model": (
        "alike",
        ["--ratio", "0.2", "--target_family", "nemotron-nas"],
        "nemotron-nas cannot say this model got: norms of queries and keys",
    ),
    "sizes by layer and a class of layers alike": (
        "alike",
        ["--ratio", "0.2", "--allocate", "free", "--target_family", "qwen3", "--data", "self"],
        "--allocate free makes layers of different sizes got: .* has layers that are alike .* leave --allocate free out",
    ),
    "every block": ("alike", ["--drop_attention", ALL, "--drop_mlp", ALL], "empties every block"),
    "a layer that is not there": ("alike", ["--drop_mlp", "4"], "layer 4: needed 0 to 3"),
    "a layer twice": ("alike", ["--drop_attention", "1,1"], "layer 1 stands twice"),
    "a block that is not there": ("m", ["--drop_attention", "0"], "layer 0 has no attention"),
    "a wider layer": ("m", ["--layer_sizes", '{"1": {"ffn_hidden_size": 41}}'], "layer 1: ffn_hidden_size 41 is larger .* 40"),
    "a layer twice in a file": (
        "alike",
        ["--layer_sizes", '{"1": {"ffn_hidden_size": 4}, "1": {"mlp": "none"}}'],
        "the field '1' twice needed: every field once",
    ),
    "a layer by two spellings": ("alike", ["--layer_sizes", '{"1": {"ffn_hidden_size": 4}, "01": {"mlp": "none"}}'], "got: '01'"),
    "a digit of another script": ("alike", ["--layer_sizes", '{"١": {"ffn_hidden_size": 4}}'], 'numbers of layers, such as "3"'),
    "a file that is none": ("m", ["--layer_sizes", '{"1": {"width": 4}}'], "no field 'width'.*some of ffn_hidden_size"),
    "an odd multiple": (
        "alike",
        ["--layer_sizes", '{"2": {"ffn_hidden_size": 33}}', "--multiple_of", "ffn=8"],
        "33 of a layer is not a multiple of 8; nearest: 32 or 40",
    ),
    "uniform alone": ("alike", ["--uniform"], "--uniform without --plan"),
    "a class of layers alike": (
        "alike",
        ["--drop_mlp", "1", "--target_family", "qwen3"],
        "layers that are alike.*qwen3-per-layer",
    ),
    "a plan and sizes": ("alike", ["--plan", "{plan}", "--drop_mlp", "1"], "--plan and --drop-mlp both say what stays"),
    "a plan that contradicts itself": ("alike", ["--plan", "{plan}"], "layer 1: kv_head.*units, and a block that is none"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_refused_leaves_nothing_behind(home, tmp_path, capsys, name):
    source, argv, words = REFUSED[name]
    for number, word in enumerate(argv):
        if word.startswith('{"'):
            (tmp_path / "sizes.json").write_text(word)
            argv = [*argv[:number], str(tmp_path / "sizes.json"), *argv[number + 1 :]]
        if word == "{plan}":
            contradiction(home, tmp_path / "p.json")
            argv = [*argv[:number], str(tmp_path / "p.json"), *argv[number + 1 :]]
    before = set(tmp_path.iterdir())
    metric = [] if {"--plan", "--uniform", "--allocate"} & {*argv} else ["--metric", "magnitude"]
    with pytest.raises(SystemExit) as error:
        main(["prune", "--load", str(home / source), "--save", str(tmp_path / "out"), *metric, *argv])
    told = " ".join(capsys.readouterr().err.split())
    assert error.value.code == 2
    assert re.search(words, told), told
    assert set(tmp_path.iterdir()) == before


def test_a_width_that_ranks_cannot_share_is_refused_on_all_of_them(home, ranks, tmp_path):
    (tmp_path / "sizes.json").write_text('{"2": {"ffn_hidden_size": 33}}')
    options = {"load": str(home / "alike"), "save": str(tmp_path / "out"), "layer_sizes": str(tmp_path / "sizes.json"), **TP2_PP2}
    with pytest.raises(RankFailed, match="layer 2: ffn_hidden_size 33 does not divide over 2 ranks; legal") as error:
        ranks(4).run(rank_jobs.run_steps, ("prune", {**options, "metric": "magnitude"}))
    assert error.value.kinds == dict.fromkeys(range(4), "InputError")
    assert [path.name for path in tmp_path.iterdir()] == ["sizes.json"]


def contradiction(home: Path, path: Path) -> None:
    """A plan for ``alike`` that keeps units of a block that goes."""
    plan = whole_plan(megatron.open_checkpoint(home / "alike").config, {}, None)
    said = json.loads(plan.dumps())
    said["layers"][1]["attention"] = "none"
    path.write_text(json.dumps(said))
