"""The Python interface: as the command line does, on models in memory too; and every example as a user runs it."""

from __future__ import annotations

import json
import re
import runpy
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
import torch
from tiny import TEXT, build_tiny, state_dict
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.utils import logging as transformers_logging

import megatron_prune as mp
from megatron_prune import api
from megatron_prune.cli.main import main
from megatron_prune.importance.metric import METRICS
from megatron_prune.verbs.table import VERBS, options_of

ROOT = Path(__file__).resolve().parents[2]
SAMPLES = torch.randint(300, (12, 24), generator=torch.Generator().manual_seed(3))
FFN = {"ffn_hidden_size": 48}


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return build_tiny(tmp_path_factory.mktemp("api") / "model", "llama", dtype="float32")


@pytest.fixture
def model(folder):
    return AutoModelForCausalLM.from_pretrained(folder)


def same(model, folder: Path) -> bool:
    ours, theirs = model.state_dict(), state_dict(folder)
    return ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in theirs)


def test_a_model_in_memory_becomes_what_the_command_line_makes_of_its_directory(folder, model, tmp_path):
    before = {name: value.clone() for name, value in model.state_dict().items()}
    samples, texts = tmp_path / "samples.safetensors", [TEXT] * 40
    from megatron_prune.text.artifact import save_samples

    save_samples(samples, SAMPLES, {"content_id": "any"})
    small = mp.prune(model, FFN, data=SAMPLES, reconstruct=1)
    words = [
        "--ffn_hidden_size_remain",
        "48",
        "--reconstruct",
        "1",
        "--nsamples",
        "12",
        "--seq-length",
        "24",
        "--data",
        str(samples),
    ]
    main(["prune-hf", "--load", str(folder), "--save", str(tmp_path / "cli"), *words])
    assert type(small) is type(model) and small.dtype == model.dtype and same(small, tmp_path / "cli")
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items()), "what is given stays as it is"
    (tmp_path / "t.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    more = {"nsamples": 4, "seq_length": 16, "metric": "activation", "reconstruct": 0}
    mp.prune(model, FFN, texts=texts, tokenizer=folder, save=tmp_path / "api", **more)
    main(["prune-hf", "--load", str(folder), "--save", str(tmp_path / "cli2"), "--data", str(tmp_path / "t.jsonl"), *words[:2]]
         + ["--nsamples", "4", "--seq-length", "16", "--metric", "activation", "--reconstruct", "0"])  # fmt: skip
    ours, theirs = state_dict(tmp_path / "api"), state_dict(tmp_path / "cli2")
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


def test_the_path_through_a_megatron_checkpoint(folder, tmp_path):
    assert mp.convert(folder, tmp_path / "m") == tmp_path / "m"
    scores = mp.score(tmp_path / "m", tmp_path / "s", data=SAMPLES, metrics=("activation", "obs"))
    plan = mp.plan(tmp_path / "m", FFN, scores=scores, save=tmp_path / "plan.json", metric="activation")
    assert isinstance(plan, mp.Plan) and plan.dumps() == (tmp_path / "plan.json").read_text()
    mp.apply(tmp_path / "m", plan, save=tmp_path / "cut")
    assert mp.export(tmp_path / "cut", tmp_path / "hf") == tmp_path / "hf"
    mp.apply(folder, tmp_path / "plan.json", save=tmp_path / "direct")
    ours, theirs = state_dict(tmp_path / "hf"), state_dict(tmp_path / "direct")
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


def test_scores_of_a_hugging_face_directory_are_those_of_its_checkpoint(folder, tmp_path):
    mp.convert(folder, tmp_path / "m")
    plans = []
    for name in (folder, tmp_path / "m"):
        scores = mp.score(name, tmp_path / f"s{len(plans)}", data=SAMPLES)
        plans.append(mp.plan(name, {"ratio": 0.3}, scores=scores))
    one, other = plans
    assert (one.hidden, one.layers, one.new) == (other.hidden, other.layers, other.new)


def test_perplexity_is_that_of_stock_transformers(folder, model, tmp_path):
    from megatron_prune.text.windows import draw_windows

    (tmp_path / "t.txt").write_text(TEXT * 30)
    tokens = draw_windows(str(tmp_path / "t.txt"), folder, seq_length=16, count=3).tokens
    with torch.no_grad():
        logits = model.double()(tokens).logits[:, :-1]
    expected = torch.nn.functional.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten()).exp().item()
    settings = {"seq_length": 16, "windows": 3}
    assert mp.evaluate(folder, tmp_path / "t.txt", windows=1)["seq_length"] == 64, "the model's context, which is below 512"
    mp.convert(folder, tmp_path / "m")
    for given, more in ((folder, {}), (model.float(), {"tokenizer": folder}), (tmp_path / "m", {})):
        found = mp.evaluate(given, tmp_path / "t.txt", **settings, **more)
        assert found["perplexity"] == pytest.approx(expected, rel=1e-5)
        assert found["windows"] == 3


def test_perplexity_on_texts_in_memory_is_that_on_a_file_of_them(folder, model, tmp_path):
    """And what a model records of itself is told, where nothing is written too; weights are not read for it."""
    texts, settings = [TEXT * 20, TEXT * 30], {"seq_length": 16, "windows": 3}
    (tmp_path / "t.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    named = mp.evaluate(folder, tmp_path / "t.jsonl", **settings)
    found = mp.evaluate(folder, texts=texts, output=tmp_path / "e.json", **settings)
    assert found["text"] == "texts" and json.loads((tmp_path / "e.json").read_text()) == found
    assert not re.search(TEMPORARY, repr(found))
    assert {**found, "text": 0, "content_id": None} == {**named, "text": 0} and named["content_id"] is None
    held = mp.evaluate(model, texts=iter(texts), tokenizer=folder, **settings)
    assert held["perplexity"] == named["perplexity"] and held["text"] == "texts"
    mp.convert(folder, tmp_path / "m")
    told = mp.evaluate(tmp_path / "m", texts=texts, **settings)["content_id"]
    assert told and told == found["content_id"]


def test_a_vocabulary_and_a_recovery(folder, tmp_path):
    (tmp_path / "t.txt").write_text(TEXT * 60)
    small = mp.trim_vocabulary(folder, tmp_path / "small", size=280, data=tmp_path / "t.txt")
    assert json.loads((small / "config.json").read_text())["vocab_size"] == 280
    mp.convert(small, tmp_path / "m")
    (tmp_path / "t.jsonl").write_text((json.dumps({"text": TEXT}) + "\n") * 60)
    main(["preprocess", "--input", str(tmp_path / "t.jsonl"), "--tokenizer", str(small), "--save", str(tmp_path / "d")])
    sizes = {"seq_length": 16, "global_batch_size": 2, "eval_iters": 1, "split": "60,40,0"}
    best = mp.recover(tmp_path / "m", tmp_path / "run", tmp_path / "d_text_document", train_iters=2, lr=1e-3, **sizes)
    assert best == tmp_path / "run" / "best"
    assert mp.evaluate(best, tmp_path / "t.txt", seq_length=16, windows=1)["perplexity"] > 1


def test_a_metric_of_ones_own(folder):
    @mp.metric("largest_squares", axes=["ffn"])
    def largest(weight):
        return torch.zeros_like(weight)

    @mp.metric("largest_squares", axes=["ffn", "head"])  # a cell that runs again
    def squares(weight):
        return weight.square()

    @mp.metric("by_class")
    class Norm(mp.Metric):
        reads_weights = True

        def per_weight(self, axis, tensor, weight, cols):
            return weight.double().square()

        def finish(self, axis, layer, total):
            return total.sqrt()

    try:
        assert METRICS.get("largest_squares").axes == {"ffn", "head"}
        kept = [mp.plan(folder, FFN, metric=name, refit=False).layers for name in ("largest_squares", "by_class", "magnitude")]
        assert kept[0] == kept[1] == kept[2]
        for name, axes, said in (
            ("magnitude", ["ffn"], "there already"),
            ("a b:c", ["ffn"], "letters"),
            ("new", "fnn", "did you mean 'ffn'"),
        ):
            with pytest.raises(mp.InputError, match=said):
                mp.metric(name, axes=axes)
        for wrong, said in (
            (lambda w: w.sum(-1), "got: a tensor"),
            (lambda w: None, "got: NoneType"),
            (lambda w: w.sum(), "got: a tensor"),
        ):
            mp.metric("largest_squares", axes="ffn")(wrong)
            with pytest.raises(mp.InputError, match=f"(?s)metric largest_squares.*{said}.*needed: a tensor"):
                mp.plan(folder, FFN, metric="largest_squares", refit=False)
    finally:
        METRICS.forget("largest_squares"), METRICS.forget("by_class")


def test_a_class_that_is_no_metric_is_refused_where_it_is_filed(folder, tmp_path):
    """By what it lacks; one that cannot be made is reported where it is named, and nowhere else."""

    class Unfinished(mp.Metric):
        reads_weights = True

    class Unsummed(mp.Metric):
        needs, finish = frozenset({"gradients"}), lambda self, axis, layer, total: total

    class Spread(mp.Metric):
        reads_units = True
        finish, per_unit = (lambda self, axis, layer, total: total), (lambda self, axis, layer, parts, samples: samples)

    class Raises(mp.Metric):
        finish = lambda self, axis, layer, total: total

        def __init__(self, **given):
            raise RuntimeError("no file of mine")

    for given, said in (
        (Unfinished, "metric c1: Unfinished lacks finish, per_weight"),
        (Unsummed, "metric c1: Unsummed lacks sums"),
        (Spread, "metric c1: units of hidden, layer are on all ranks"),
        (dict, "metric c1\n  got: the class dict\n  needed: one derived from mp.Metric"),
        (3, "metric c1\n  got: 3\n  needed: a function of weights, or a class"),
    ):
        with pytest.raises(mp.InputError, match=said):
            mp.metric("c1")(given)
        assert "c1" not in METRICS.names()
    for bare in (Raises, lambda weight: weight):
        with pytest.raises(mp.InputError, match=r'mp.metric\n.*\n  needed: .* @mp.metric\("name"\)'):
            mp.metric(bare)
    try:
        mp.metric("c1")(Raises)
        mp.prune(folder, FFN, save=tmp_path / "o", metric="magnitude", data=SAMPLES, reconstruct=0)
        with pytest.raises(
            mp.InputError, match="metric c1 cannot be made: its __init__ fails\n  got: RuntimeError: no file of mine"
        ):
            mp.prune(folder, FFN, save=tmp_path / "p", metric="c1")
        with pytest.raises(mp.InputError, match="(?s)metric perplexity needs .*one of .*c1"):
            mp.prune(folder, {"num_layers": 2}, save=tmp_path / "p", depth_metric="perplexity")
    finally:
        METRICS.forget("c1")


TEMPORARY = r"temporary|\btmp[a-z0-9_]{8}\b"
"""The directory of temporary files in these tests, and how those in it are called."""


def filled(folder: Path) -> Path:
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    return folder


def talk(file: Path) -> Path:
    file.write_text('{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}\n' * 9)
    return file


@pytest.mark.parametrize(
    "call, said",
    [
        (lambda m, f, t: mp.prune(m, {"fnn_hidden_size": 48}), "'fnn_hidden_size' is no key of target=; did you mean 'ffn_hid"),
        (lambda m, f, t: mp.prune(m, {}), "target= says nothing"),
        (lambda m, f, t: mp.prune(m, None), "target=\\s+got: None"),
        (lambda m, f, t: mp.plan(f, 64), "target=\\s+got: 64"),
        (lambda m, f, t: mp.apply(m, FFN), "plan=\\s+got: {'ffn_hidden_size': 48}.*mp.plan"),
        (lambda m, f, t: mp.apply(m, None), "plan=\\s+got: None"),
        (lambda m, f, t: mp.prune(m, FFN, ratio=0.2), 'ratio= is no argument of its own.*in target=: {"ratio": 0.2}'),
        (lambda m, f, t: mp.prune(m, {"ratio": 2}), "ratio: 2.0 is not above 0 and below 1"),
        (lambda m, f, t: mp.prune(m, {"ffn_hidden_size": 1000}), "- ffn_hidden_size 1000 is larger"),
        (lambda m, f, t: mp.prune(f, FFN), "save="),
        (lambda m, f, t: mp.prune(f, FFN, save=3), "save=\\s+got: 3\\s+needed: a name, or a path"),
        (lambda m, f, t: mp.prune(f, FFN, save=f), "output .* the input .*name another directory"),
        (
            lambda m, f, t: mp.prune(m, FFN, save=filled(t / "x")),
            "x exists.*pass overwrite=True to replace it",
        ),
        (lambda m, f, t: mp.plan(m, FFN), "load=\\s+got: LlamaForCausalLM\\s.*save_pretrained"),
        (lambda m, f, t: mp.convert(m, t / "o"), "load=\\s+got: LlamaForCausalLM\\s"),
        (lambda m, f, t: mp.evaluate(m, [TEXT]), "data=\\s+got: (list of 1|.'A small).*texts in memory as texts=$"),
        (lambda m, f, t: mp.evaluate(f), "^data= or texts=\\s+got: neither"),
        (lambda m, f, t: mp.evaluate(f, __file__, texts=[TEXT]), "^data= and texts="),
        (lambda m, f, t: mp.evaluate(f, texts=["a"]), "texts"),
        (lambda m, f, t: mp.prune(m, FFN, data={"input_ids": SAMPLES}), "data=\\s+got: dict of 1\\s.*texts="),
        (lambda m, f, t: mp.prune(m, FFN, data=SAMPLES.float()), "data=\\s+got: float32 .12, 24.\\s.*int64 .samples, tokens."),
        (lambda m, f, t: mp.prune(m, FFN, data=SAMPLES[0]), "data=\\s+got: int64 .24.\\s"),
        (lambda m, f, t: mp.prune(m, FFN, data=SAMPLES + 300), "data: a token is not in the model's vocabulary"),
        (lambda m, f, t: mp.prune(m, FFN, texts=[]), "texts=\\s+got: ..\\s+needed: at least one"),
        (lambda m, f, t: mp.prune(m, FFN, texts=[TEXT, {"text": 1}]), "texts=\\s+got: {'text': 1}"),
        (
            lambda m, f, t: mp.prune(m, FFN, data=talk(t / "talk.jsonl"), tokenizer=f),
            "the tokenizer Llama.* has no chat template",
        ),
        (
            lambda m, f, t: mp.prune(m, {"params": 9e4}),
            "params\\s+got: 90000.0\\s+needed: a text, or a whole number, such as .*90M",
        ),
        (lambda m, f, t: mp.prune(m, FFN, serve=["vllm", "tp=2"]), 'needed: a text, such as serve="vllm,.*: serve="vllm,tp=2"$'),
        (
            lambda m, f, t: mp.prune(m, FFN, multiple_of={"hidden": 16}),
            'needed: a text, such as.*one text: multiple_of="hidden=16"$',
        ),
        (lambda m, f, t: mp.prune(m, FFN, depth_metric=3.5), "^depth_metric\\s+got: 3.5\\s+needed: a text$"),
        (lambda m, f, t: mp.prune(m, FFN, depth_metric=len), "needed: a name.*@mp.metric"),
        (lambda m, f, t: mp.score(f, t / "o", metrics=["obs", len]), "^metrics=.*needed: a name.*@mp.metric"),
        (lambda m, f, t: mp.prune(m, {"drop_layers": "1,2"}), "^drop_layers\\s+got: '1,2'\\s+needed: a list of whole numbers"),
        (
            lambda m, f, t: mp.prune(m, {"layer_sizes": {1: {"fnn_hidden_size": 32}}}),
            "^layer_sizes: layer 1: there is no field 'fnn_hidden_size'; did you mean 'ffn_hidden_size'.*some of ffn_hidden",
        ),
        (lambda m, f, t: mp.prune(m, {"layer_sizes": {1: 32}}), "^layer_sizes: '1'.*what to do: write sizes by layer so"),
        (lambda m, f, t: mp.prune(m, FFN, texts=["a"], tokenizer=f), "texts holds fewer tokens.*nsamples=, seq_length="),
        (lambda m, f, t: mp.prune(m, FFN, texts=[TEXT]), "there is none in LlamaForCausalLM in memory.*name one with tokenizer="),
        (lambda m, f, t: mp.evaluate(m, __file__), "there is none in LlamaForCausalLM in memory.*name one with tokenizer="),
        (lambda m, f, t: mp.prune(m, FFN, texts=[TEXT], tokenizer=3), "tokenizer=\\s+got: 3"),
        (lambda m, f, t: mp.prune(m.model, FFN), "architectures\\s+got: .'LlamaModel'"),
        (lambda m, f, t: mp.prune(m.to("meta"), FFN), "LlamaForCausalLM on meta"),
        (lambda m, f, t: mp.prune(m, FFN, dtype=torch.bfloat16), "dtype\\s+got: torch.bfloat16\\s+needed: one of fp32, bf16"),
        (lambda m, f, t: mp.prune(m, FFN, refit=False, ridge=1.0), "ridge= where nothing.*data=, without refit=False"),
        (lambda m, f, t: mp.trim_vocabulary(f, t / "o"), "one of size=, min_count="),
        (lambda m, f, t: mp.convert(f, t / "o", tensor_parallel=0), "^tensor_parallel: 0 is not a positive number"),
        (
            lambda m, f, t: mp.convert(f, t / "o", tensor_parallel=1, target_tensor_parallel_size=2),
            "^target_tensor_parallel_size is no argument of mp.convert.*say tensor_parallel=$",
        ),
        (
            lambda m, f, t: mp.trim_vocabulary(f, t / "o", size=280, remain_vocab_size=290),
            "^remain_vocab_size is no argument of mp.trim_vocabulary.*say size=$",
        ),
        (lambda m, f, t: mp.prune(f, FFN, save=t / "o", plan="p.json"), "^plan is no argument of mp.prune.*say target=$"),
        (lambda m, f, t: mp.prune(f, FFN, save=t / "o", load="other"), "^load is no argument of mp.prune.*say model=$"),
        (lambda m, f, t: mp.prune(m, FFN, model_name_or_path="other"), "is no argument of mp.prune.*say model=$"),
        (lambda m, f, t: mp.evaluate(f, __file__, load="other"), "^load is no argument of mp.evaluate.*say model=$"),
        (
            lambda m, f, t: mp.prune(f, FFN, save=t / "o", metrik="obs"),
            "metrik is no argument of mp.prune; did you mean metric?",
        ),
        (
            lambda m, f, t: mp.prune(f, {"ffn_hidden_size": "48"}, save=t / "o"),
            "^ffn_hidden_size\\s+got: '48'\\s+needed: a whole",
        ),
        (lambda m, f, t: mp.prune(f, {"ffn_hidden_size": True}, save=t / "o"), "got: True"),
        (lambda m, f, t: mp.prune(f, {"ratio": float("nan")}, save=t / "o"), "'nan' is not a finite number"),
        (lambda m, f, t: mp.prune(f, FFN, save=t / "o", dtype="fp8"), "dtype: 'fp8' is none of fp32, bf16, fp16"),
        (lambda m, f, t: mp.prune(f, t / "no.json", save=t / "o"), 'target=".*no.json": no such file or directory'),
        (lambda m, f, t: mp.prune(f, FFN, save=t / "o", nsamples=0), "nsamples: 0 is not a positive number"),
        (lambda m, f, t: mp.prune(m, FFN, data=["a"], texts=["b"]), "data= and texts="),
        (lambda m, f, t: mp.prune(m, FFN, texts="one text"), "a sequence of texts"),
        (lambda m, f, t: mp.prune(3, FFN), "model=\\s+got: 3"),
        (lambda m, f, t: mp.prune(f, FFN, save=t / "o", tokenizer=m), "tokenizer=\\s+got: LlamaForCausalLM"),
        (lambda m, f, t: mp.plan(f, __file__), "target=.*is a plan already.*alike: uniform=True"),
        (lambda m, f, t: mp.plan(f, FFN, ridge=1.0), "^ridge: nothing is fitted"),
        (lambda m, f, t: mp.convert(t / "none", t / "o"), "no such model directory"),
    ],
)
def test_what_does_not_fit_is_refused_in_the_words_of_the_caller(folder, model, tmp_path, monkeypatch, caplog, call, said):
    (tmp_path / "temporary").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "temporary"))
    caplog.set_level("INFO")
    with pytest.raises(mp.InputError, match=f"(?s){said}") as found:
        call(model, folder, tmp_path)
    assert not (tmp_path / "o").exists() and not any((tmp_path / "temporary").iterdir())
    assert "--" not in str(found.value) and not re.search(TEMPORARY, str(found.value) + caplog.text)


def test_nothing_that_comes_back_names_a_temporary_file(folder, model, tmp_path, monkeypatch, caplog):
    """Neither what is returned, nor what is written, nor the log."""
    (tmp_path / "temporary").mkdir()
    (tmp_path / "t.txt").write_text(TEXT * 60)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "temporary"))
    caplog.set_level("INFO")
    bars = transformers_logging.is_progress_bar_enabled()
    text = {
        "nsamples": 4,
        "seq_length": 16,
        "texts": (TEXT for _ in range(40)),
        "tokenizer": AutoTokenizer.from_pretrained(folder),
    }
    saved = mp.prune(model, FFN, save=tmp_path / "small", metric="activation", reconstruct=0, **text)
    assert saved.name_or_path == saved.config.name_or_path == str(tmp_path / "small")
    result = mp.evaluate(
        model, tmp_path / "t.txt", seq_length=16, windows=1, tokenizer=folder, output=tmp_path / "small" / "e.json"
    )
    assert result["checkpoint"] == "LlamaForCausalLM in memory"
    plan = mp.plan(folder, FFN, metric="magnitude", refit=False)
    assert repr(plan) == "<Plan: ffn_hidden_size 96 → 48>"
    small = mp.apply(model, plan)
    assert small.name_or_path == small.config.name_or_path == "", "it is none that anybody could load"
    mp.score(folder, tmp_path / "small" / "scores", texts=[TEXT] * 40, nsamples=4, seq_length=16, metrics="activation")
    mp.trim_vocabulary(folder, tmp_path / "small" / "trimmed", size=280, data=tmp_path / "t.txt")
    assert not [left for left in (tmp_path / "temporary").iterdir() if not left.name.startswith("pymp-")], "but multiprocessing's"
    written = [file for file in (tmp_path / "small").rglob("*") if file.is_file()]
    assert len(written) > 15 and not [file for file in written if re.search(TEMPORARY.encode(), file.read_bytes())]
    assert "text: texts (50%)" in caplog.text and "pruned to memory" in caplog.text
    said = caplog.text + repr([result, plan.made_by, small.config.to_dict(), saved.config.to_dict(), small.__dict__])
    assert not re.search(TEMPORARY, said) and "--" not in caplog.text
    assert transformers_logging.is_progress_bar_enabled() == bars


def test_a_plan_that_is_applied_is_not_warned_of(folder, model, tmp_path, caplog):
    """That nothing is re-fitted is what it means; with text what stays is re-fitted."""
    plan = mp.plan(folder, FFN, metric="magnitude", refit=False)
    cut = mp.apply(model, plan)
    assert not [record for record in caplog.records if record.levelname == "WARNING"]
    rows = torch.tensor(plan.layers[1].ffn)
    assert torch.equal(cut.state_dict()["model.layers.1.mlp.up_proj.weight"], model.model.layers[1].mlp.up_proj.weight[rows])
    mp.prune(model, plan)
    assert "name text with data=, or pass refit=True" in caplog.text
    fitted = mp.apply(model, plan, data=SAMPLES, reconstruct=0)
    assert not torch.equal(fitted.model.layers[1].mlp.down_proj.weight, cut.model.layers[1].mlp.down_proj.weight)


def test_values_may_be_of_the_kinds_that_python_has(folder, model):
    """numpy samples, sizes by layer as a mapping, numbers of layers as a range or an array; a model of bf16 stays one."""
    numpy = pytest.importorskip("numpy")
    cut = mp.prune(model, FFN, data=SAMPLES, reconstruct=0, metric="activation")
    other = mp.prune(model, FFN, data=SAMPLES.int().numpy(), reconstruct=0, metric="activation")
    assert all(torch.equal(value, other.state_dict()[name]) for name, value in cut.state_dict().items())
    for drop in ([1, 2], range(1, 3), numpy.array([1, 2])):
        assert mp.prune(model, {"drop_layers": drop}, refit=False).config.num_hidden_layers == 2
    by_layer = mp.prune(model, {"layer_sizes": {1: {"ffn_hidden_size": 32}}}, refit=False, metric="magnitude")
    assert [layer.mlp.up_proj.out_features for layer in by_layer.model.layers] == [96, 32, 96, 96]
    assert mp.prune(model.bfloat16(), FFN, metric="magnitude", refit=False).dtype == torch.bfloat16


def test_a_tokenizer_may_be_named_beside_a_directory_without_one(folder, model, tmp_path):
    model.save_pretrained(tmp_path / "bare")
    text = {"texts": [TEXT] * 40, "nsamples": 4, "seq_length": 16, "metric": "activation", "reconstruct": 0}
    with pytest.raises(mp.InputError, match="there is none in .*bare\n.*name one with tokenizer="):
        mp.prune(tmp_path / "bare", FFN, save=tmp_path / "o", **text)
    mp.prune(tmp_path / "bare", FFN, save=tmp_path / "o", tokenizer=folder, **text)
    mp.prune(folder, FFN, save=tmp_path / "own", **text)
    ours, theirs = state_dict(tmp_path / "o"), state_dict(tmp_path / "own")
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


def test_a_script_without_a_guard_counts_in_processes_of_its_own(folder, tmp_path):
    """They do not run the script again."""
    (tmp_path / "t.txt").write_text(TEXT * 60)
    call = f"mp.trim_vocabulary({str(folder)!r}, {str(tmp_path / 'o')!r}, size=280, data={str(tmp_path / 't.txt')!r})"
    (tmp_path / "script.py").write_text(f"import megatron_prune as mp\nprint('once')\nprint({call}.name)\n")
    done = subprocess.run([sys.executable, str(tmp_path / "script.py")], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.split().count("once") == 1 and done.stdout.split()[-1] == "o" and "Error" not in done.stderr
    assert json.loads((tmp_path / "o" / "config.json").read_text())["vocab_size"] == 280


def test_numbers_of_a_metric_that_are_none_are_its_own(folder, tmp_path, caplog):
    @mp.metric("mine", axes=["ffn"])
    def mine(weight):
        return torch.where(weight == weight.max(), torch.nan, weight)

    class Base(mp.Metric):
        reads_weights = True

        def per_weight(self, axis, tensor, weight, cols):
            return weight.double().square()

        def finish(self, axis, layer, total):
            return total

    @mp.metric("finished")
    class Finished(Base):
        def finish(self, axis, layer, total):
            return total / (layer != 2)

    @mp.metric("concluded")
    class Concluded(Base):
        def conclude(self, scores):
            return {key: value.log() - value.log().mean() * (torch.inf if key[1] == 3 else 1) for key, value in scores.items()}

    @mp.metric("whole")
    class Whole(mp.Metric):
        axes, reads_units = frozenset({"ffn"}), True

        def per_unit(self, axis, layer, parts, samples):
            total = parts["up"].weight.flatten(1).sum(1)
            return torch.where(torch.arange(len(total)) == 5, torch.inf, total) if layer == 1 else total

        def finish(self, axis, layer, total):
            return total

    names = {
        "mine": "(?s)^metric mine is not finite\n.*NaN or infinity of the finite weights of gate in layer 0",
        "finished": "metric finished is not finite at ffn in layer 2, .*\n  got: inf for unit 0 and 95 more",
        "concluded": "metric concluded is not finite at ffn in layer 3",
        "whole": "metric whole is not finite at ffn in layer 1\n  got: inf for unit 5\n",
    }
    try:
        for name, said in names.items():
            with pytest.raises(mp.InputError, match=said):
                mp.plan(folder, FFN, metric=name, refit=False)
        assert "dropped first" not in caplog.text
        broken = AutoModelForCausalLM.from_pretrained(folder)
        broken.model.layers[1].mlp.up_proj.weight.data[7, 3] = torch.nan
        broken.save_pretrained(tmp_path / "broken")
        METRICS.forget("mine")
        mp.metric("mine", axes=["ffn"])(lambda weight: weight.abs())
        plan = mp.plan(tmp_path / "broken", FFN, metric="mine", refit=False)
        assert "ffn in layer 1: units [7] have weights that are not finite" in caplog.text and 7 not in plan.layers[1].ffn
    finally:
        [METRICS.forget(name) for name in names]


def test_verbs_without_a_function_are_named_in_the_documentation_and_run(folder, capsys):
    functions = {"convert", "export", "score", "plan", "prune", "prune-hf", "evaluate", "recover", "vocab trim"}
    words = (ROOT / "docs" / "api.md").read_text(encoding="utf-8")
    said = re.search(r"\*\*Verbs without a function\*\* are (.*?):", words, re.DOTALL).group(1)
    assert set(re.findall(r"`([a-z -]+)`", said)) == set(VERBS) - functions
    assert api.run("inspect", options_of("inspect")(load=str(folder))) == 0 and "parameters" in capsys.readouterr().out


def test_the_names_are_there_without_torch():
    code = (
        "import sys, megatron_prune as mp; print('torch' in sys.modules, mp.__all__ == sorted(mp.__all__[:-3]) + mp.__all__[-3:])"
    )
    code += "; print(all(hasattr(mp, name) for name in mp.__all__), dir(mp) == sorted(['__version__', *mp.__all__]))"
    code += "; here = {}; exec('from megatron_prune import *', here); print(set(here) - {'__builtins__'} == set(mp.__all__))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["False", "True", "True", "True", "True"]
    with pytest.raises(AttributeError):
        mp.nothing


def test_type_checkers_see_the_names_that_there_are():
    import ast

    stub = ast.parse((ROOT / "megatron_prune" / "__init__.pyi").read_text(encoding="utf-8"))
    named = {alias.asname for node in stub.body if isinstance(node, ast.ImportFrom) for alias in node.names}
    assert named == set(mp.__all__) and (ROOT / "megatron_prune" / "py.typed").exists()


# ------------------------------------------------------------------------------------------------------------- examples

EXAMPLES = sorted(path.name for path in (ROOT / "examples").glob("*.py"))


@pytest.mark.parametrize("name", [name for name in EXAMPLES if name != "tensor_parallel.py"])
def test_an_example_runs(name, folder, tmp_path, monkeypatch, capsys):
    (tmp_path / "t.txt").write_text(TEXT * 60)
    monkeypatch.setattr(sys, "argv", [name, str(folder), str(tmp_path / "t.txt")])
    try:
        runpy.run_path(str(ROOT / "examples" / name), run_name="__main__")
    finally:
        METRICS.forget("fourth_powers")
    assert "→" in capsys.readouterr().out


def test_the_example_of_several_ranks_runs(folder, tmp_path):
    (tmp_path / "t.txt").write_text(TEXT * 60)
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    words = [*launch, str(ROOT / "examples" / "tensor_parallel.py"), str(folder), str(tmp_path / "t.txt"), str(tmp_path)]
    done = subprocess.run(words, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "at TP 2" in done.stdout
    assert state_dict(tmp_path / "hf")["model.layers.0.mlp.up_proj.weight"].shape[0] == 48


def test_the_notebook_runs(folder, monkeypatch):
    monkeypatch.setenv("MODEL", str(folder))
    cells = json.loads((ROOT / "examples" / "quickstart.ipynb").read_text(encoding="utf-8"))["cells"]
    names: dict = {}
    for cell in cells:
        if cell["cell_type"] == "code":
            exec("".join(cell["source"]), names)
    assert names["cut"].num_parameters() < names["model"].num_parameters()
