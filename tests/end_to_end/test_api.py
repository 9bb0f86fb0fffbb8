"""The Python interface: as the command line does, on models in memory too; and every example as a user runs it."""

from __future__ import annotations

import json
import runpy
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from tiny import TEXT, build_tiny, state_dict
from transformers import AutoModelForCausalLM

import megatron_prune as mp
from megatron_prune.cli.main import main
from megatron_prune.importance.metric import METRICS

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


@pytest.mark.parametrize(
    "call, said",
    [
        (lambda m, f, t: mp.prune(m, {"fnn_hidden_size": 48}), "fnn_hidden_size is no option.*did you mean ffn_hidden_size"),
        (lambda m, f, t: mp.prune(f, FFN), "save"),
        (
            lambda m, f, t: mp.prune(f, FFN, save=t / "o", metrik="obs"),
            "metrik is no option of PruneHfOptions; did you mean metric?",
        ),
        (
            lambda m, f, t: mp.prune(f, {"ffn_hidden_size": "48"}, save=t / "o"),
            "ffn_hidden_size_remain\\s+got: '48'\\s+needed: a whole",
        ),
        (lambda m, f, t: mp.prune(f, {"ffn_hidden_size": True}, save=t / "o"), "got: True"),
        (lambda m, f, t: mp.prune(f, {"ratio": float("nan")}, save=t / "o"), "'nan' is not a finite number"),
        (lambda m, f, t: mp.prune(f, FFN, save=t / "o", dtype="fp8"), "dtype: 'fp8' is none of fp32, bf16, fp16"),
        (lambda m, f, t: mp.prune(f, t / "no.json", save=t / "o"), "no.json: no such file or directory"),
        (lambda m, f, t: mp.prune(f, FFN, save=t / "o", nsamples=0), "nsamples: 0 is not a positive number"),
        (lambda m, f, t: mp.prune(m, FFN, data=["a"], texts=["b"]), "data and texts"),
        (lambda m, f, t: mp.prune(m, FFN, texts="one text"), "a sequence of texts"),
        (lambda m, f, t: mp.prune(3, FFN), "model\\s+got: int"),
        (lambda m, f, t: mp.prune(f, FFN, save=t / "o", tokenizer=f), "tokenizer beside a directory"),
        (lambda m, f, t: mp.plan(f, {"plan": __file__}), "is a plan already"),
        (lambda m, f, t: mp.plan(f, FFN, ridge=1.0), "--ridge: nothing is fitted"),
        (lambda m, f, t: mp.convert(t / "none", t / "o"), "no such model directory"),
    ],
)
def test_what_does_not_fit_is_refused_as_on_the_command_line(folder, model, tmp_path, call, said):
    with pytest.raises(mp.InputError, match=f"(?s){said}"):
        call(model, folder, tmp_path)
    assert not (tmp_path / "o").exists()


def test_the_names_are_there_without_torch():
    code = (
        "import sys, megatron_prune as mp; print('torch' in sys.modules, mp.__all__ == sorted(mp.__all__[:-3]) + mp.__all__[-3:])"
    )
    code += "; print(all(hasattr(mp, name) for name in mp.__all__), set(mp.__all__) <= set(dir(mp)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["False", "True", "True", "True"]
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
