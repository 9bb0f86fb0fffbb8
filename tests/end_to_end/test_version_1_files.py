"""Files of version 1 of every kind, made at commit 832aadf (``fixtures/make_v1.py``): they open, and lead to what they led to.

What only moves or selects numbers is compared by content id, to the bit. What is computed from text is compared within what
another processor's order of sums changes.
"""

from __future__ import annotations

import json
import shutil
import tarfile
from pathlib import Path
from typing import Any

import pytest
import rank_jobs
import torch
import xxhash
from foreign import run
from ranks import forking_context
from safetensors.torch import load_file
from tiny import logits, state_dict

from megatron_prune.cli.main import main

HOME = Path(__file__).resolve().parents[1] / "fixtures" / "v1"
EXPECTED = json.loads((HOME / "expected.json").read_text(encoding="utf-8"))
ROUNDING = 2e-5
"""Of the largest score. On one machine all are equal to the bit; with the kernels of an old processor (``ATEN_CPU_CAPABILITY``,
``MKL_ENABLE_INSTRUCTIONS``) ``obs``, which solves with second moments, was off by 4e-6, all else by less than 1e-6."""
ONE = ("--tensor-model-parallel-size", 1, "--pipeline-model-parallel-size", 1)


@pytest.fixture(scope="module")
def files(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("version_1")
    with tarfile.open(HOME / "files.tar.xz") as archive:
        archive.extractall(folder, filter="data")
    return folder


@pytest.fixture(autouse=True)
def there(files, monkeypatch) -> None:
    """Commands name the files as they did when these were made."""
    monkeypatch.chdir(files)


@pytest.fixture
def facts(capsys):
    """``facts(path, "--weights")``: what ``inspect`` says, after exit code 0."""

    def get(path: Path | str, *more: str) -> dict[str, Any]:
        capsys.readouterr()
        assert run("inspect", path, "--json", *more) == 0
        return json.loads(capsys.readouterr().out)

    return get


def digest(data: torch.Tensor) -> str:
    """Of shape, dtype and bytes."""
    state = xxhash.xxh3_128(f"{tuple(data.shape)} {data.dtype} ".encode())
    state.update(data.contiguous().view(-1).view(torch.uint8).numpy().tobytes())
    return state.hexdigest()


def digests(folder: Path) -> dict[str, str]:
    return {name: digest(data) for name, data in state_dict(folder).items()}


def kept(plan: Path) -> dict[str, Any]:
    """What a plan keeps, and of which model: all but how it came to be, and the version of the file (2 says no less than 1)."""
    return {key: value for key, value in json.loads(plan.read_text()).items() if key not in ("made_by", "version")}


def assert_logits(folder: Path, wanted: list[list[float]], atol: float) -> None:
    """Stock transformers' logits on tokens 2 to 9, of every 68th token."""
    found = logits(folder, torch.arange(2, 10)[None])[0, :, ::68]
    torch.testing.assert_close(found, torch.tensor(wanted), rtol=0, atol=atol)


# ------------------------------------------------------------------------------------------------------------ checkpoints


@pytest.mark.parametrize("checkpoint", EXPECTED["stored_ids"])
def test_a_checkpoint_opens_and_its_weights_are_those_that_were_written(checkpoint, facts):
    found = facts(checkpoint, "--weights")
    assert found["content_id"] == EXPECTED["stored_ids"][checkpoint]
    assert found["compared_with"] == "the digest of every tensor"
    assert not found["changed_weights"] and not found["changed_files"] and not found["unsound_weights"]


@pytest.mark.parametrize("checkpoint", EXPECTED["checkpoints"])
def test_a_converted_checkpoint_is_exported_to_the_bytes_it_came_from(checkpoint, tmp_path):
    family = EXPECTED["checkpoints"][checkpoint]
    assert run("export", "--load-dir", f"m/{checkpoint}", "--save-dir", tmp_path / "hf") == 0
    for name in ("model.safetensors", "config.json", "tokenizer.json"):
        assert (tmp_path / "hf" / name).read_bytes() == Path("hf", family, name).read_bytes(), name


@pytest.mark.parametrize("family", EXPECTED["models"])
def test_a_model_is_converted_to_the_content_id_it_had(family, tmp_path, facts):
    wanted = EXPECTED["models"][family]
    assert digests(Path("hf", family)) == wanted["tensors"]
    assert_logits(Path("hf", family), wanted["logits"], atol=1e-4)  # float32 of size 1, sums of 32 products, 4 layers
    assert run("convert", "--load-dir", f"hf/{family}", "--save-dir", tmp_path / "m", "--target-tensor-parallel-size", 2) == 0
    assert facts(tmp_path / "m")["content_id"] == wanted["content_id"]


@pytest.mark.parametrize("name", EXPECTED["pruned"])
def test_a_pruned_checkpoint_is_exported_to_the_model_it_was(name, tmp_path, facts):
    assert run("export", "--load-dir", f"pruned/{name}", "--save-dir", tmp_path / "hf") == 0
    assert_logits(tmp_path / "hf", EXPECTED["pruned"][name]["logits"], atol=1e-4)
    assert run("convert", "--load-dir", tmp_path / "hf", "--save-dir", tmp_path / "known") == 0
    assert facts(tmp_path / "known")["content_id"] == EXPECTED["stored_ids"][f"pruned/{name}"]
    (tmp_path / "hf/megatron_prune_recipe.json").unlink()  # nothing says how it is known: the digest of its values counts
    assert run("convert", "--load-dir", tmp_path / "hf", "--save-dir", tmp_path / "m") == 0
    assert facts(tmp_path / "m")["content_id"] == EXPECTED["pruned"][name]["content_id"]


# ----------------------------------------------------------------------------------------------------------------- scores


@pytest.mark.parametrize("name", EXPECTED["scores"])
def test_scores_are_what_they_were(name, tmp_path):
    """The stored ones of ``qwen2`` were measured under TP 2."""
    about, save = EXPECTED["scores"][name], tmp_path / "scores"
    command = ("score", "--load", f"m/{name}", "--save", save, *EXPECTED["measured"], *ONE, "--metrics", *about["metrics"])
    assert run(*command) == 0
    stored, found = (load_file(Path(folder, "scores.safetensors")) for folder in (f"scores/{name}", save))
    assert xxhash.xxh3_128_hexdigest(Path("scores", name, "scores.safetensors").read_bytes()) == about["digest"]
    assert found.keys() == stored.keys()
    for key, value in stored.items():
        exact = key.split(".")[0] in ("magnitude", "random")  # no text
        atol = 0 if exact else ROUNDING * value.abs().max().item()
        torch.testing.assert_close(found[key], value, rtol=0, atol=atol, msg=lambda text: f"{key}: {text}")


def test_a_stopped_run_of_score_is_brought_to_its_end(tmp_path):
    """Whether a later version goes on from the parts or begins anew, the scores are those of the run that was not stopped."""
    shutil.copytree("scores/.stopped.work", tmp_path / ".stopped.work")
    assert (tmp_path / ".stopped.work/content/layer_0003.safetensors").is_file()
    assert run("score", "--load", "m/qwen2", "--save", tmp_path / "stopped", *EXPECTED["own"], *ONE) == 0
    stored, found = (load_file(folder / "scores.safetensors") for folder in (Path("scores/own"), tmp_path / "stopped"))
    assert found.keys() == stored.keys()
    for key, value in stored.items():
        torch.testing.assert_close(found[key], value, rtol=0, atol=ROUNDING * value.abs().max().item())
    assert [entry.name for entry in tmp_path.iterdir()] == ["stopped"]


# ------------------------------------------------------------------------------------------------------------------ plans


@pytest.mark.parametrize("name", EXPECTED["requests"])
def test_a_request_leads_to_the_plan_and_the_model_that_it_led_to(name, tmp_path, facts):
    source, *request = EXPECTED["requests"][name]
    by_scores = ("--scores", f"scores/{source}", "--no-refit") if name in EXPECTED["by_scores"] else ()
    words = ("prune", "--load", f"m/{source}", "--save", tmp_path / "p", "--save-plan", tmp_path / "plan.json")
    assert run(*words, *by_scores, *ONE, *request) == 0
    assert kept(tmp_path / "plan.json") == kept(Path("plans", f"{name}.json"))
    assert facts(tmp_path / "p")["content_id"] == EXPECTED["pruned"][name]["content_id"]


def test_unequal_shards_are_chosen_under_two_ranks_as_they_were(tmp_path, ranks, facts):
    options = {"load": str(Path("m/qwen3").absolute()), "save": str(tmp_path / "p"), "save_plan": str(tmp_path / "plan.json")}
    options |= {"metric": "magnitude", "prune_type": "unbalance", "ffn_hidden_size_remain": 25}
    ranks(2).run(rank_jobs.run_steps, ("prune", options))
    assert kept(tmp_path / "plan.json") == kept(Path("plans/unbalance.json"))
    assert any(entry["shards"]["ffn"][0] != entry["shards"]["ffn"][1] for entry in kept(tmp_path / "plan.json")["layers"])
    assert facts(tmp_path / "p")["content_id"] == EXPECTED["pruned"]["unbalance"]["content_id"]


SOURCES = {name: words[0] for name, words in EXPECTED["requests"].items()} | EXPECTED["unequal"]


@pytest.mark.parametrize("name", SOURCES)
def test_a_stored_plan_makes_the_model_that_it_made(name, tmp_path, facts):
    plan = ("--plan", f"plans/{name}.json")
    assert run("prune", "--load", f"m/{SOURCES[name]}", "--save", tmp_path / "p", *plan, *ONE) == 0
    assert facts(tmp_path / "p")["content_id"] == EXPECTED["pruned"][name]["content_id"]


@pytest.mark.parametrize("name", ["all", "untied", "magnitude", "random"])
def test_a_stored_plan_makes_it_without_megatron_too(name, tmp_path, facts):
    family, plan = SOURCES[name], ("--plan", f"plans/{name}.json")
    assert run("prune-hf", "--model_name_or_path", f"hf/{family}", "--output_path", tmp_path / "p", *plan) == 0
    assert run("convert", "--load-dir", tmp_path / "p", "--save-dir", tmp_path / "m") == 0
    assert facts(tmp_path / "m")["content_id"] == EXPECTED["pruned"][name]["content_id"]


@pytest.mark.parametrize("name", EXPECTED["fitted"])
def test_a_stored_plan_is_fitted_on_its_text_to_the_same_model(name, tmp_path):
    """By logits: a rotation's signs are the eigensolver's, and weights are rounded to bfloat16 at the end (an old processor's
    kernels: off by 5e-5).
    """
    source, plan = EXPECTED["fitted"][name][0], ("--plan", f"plans/{name}.json")
    assert run("prune", "--load", f"m/{source}", "--save", tmp_path / "p", *plan, *EXPECTED["measured"], *ONE) == 0
    assert run("export", "--load-dir", tmp_path / "p", "--save-dir", tmp_path / "hf") == 0
    assert_logits(tmp_path / "hf", EXPECTED["pruned"][name]["logits"], atol=2e-3)


def test_a_vocabulary_is_chosen_and_trimmed_as_it_was(tmp_path, facts):
    chosen = ("--load-dir", "hf/llama", "--counts", "counts.safetensors", "--remain-vocab-size", 262)
    assert run("vocab", "select", *chosen, "--save-plan", tmp_path / "vocab.json") == 0
    assert kept(tmp_path / "vocab.json") == kept(Path("plans/vocab.json"))
    for name, source in (("one", "m/llama_one"), ("legacy", "m/llama_legacy_te")):
        save = tmp_path / name
        assert run("vocab", "trim", "--load-dir", source, "--plan", "plans/vocab.json", "--save-dir", save) == 0
        assert facts(save)["content_id"] == EXPECTED["pruned"]["vocab"]["content_id"]


# --------------------------------------------------------------------------------------------------------------- recovery


@pytest.mark.parametrize("name", EXPECTED["runs"])
def test_a_run_that_was_stopped_goes_on(name, files, tmp_path, monkeypatch):
    shutil.copytree(f"runs/{name}", tmp_path / "runs" / name)
    for file in files.glob("*_text_document.*"):
        shutil.copy(file, tmp_path)
    monkeypatch.chdir(tmp_path)
    options = {**EXPECTED["runs"][name]["options"], "save": f"runs/{name}"}
    options["load"] = str(files / options["load"])
    words = []
    for key, value in options.items():
        words += [f"--{key.replace('_', '-')}", *map(str, value if isinstance(value, list) else [value])]
    process = forking_context().Process(target=main, args=(["recover", *words],))  # megatron-core's state ends with it
    process.start()
    process.join()
    assert process.exitcode == 0
    records = [json.loads(line) for line in Path("runs", name, "history.jsonl").read_text().splitlines()]
    assert [record["iteration"] for record in records if "loss" in record] == [1, 2, 3, 4]
    kinds = ("loss", "held_out_loss")
    found = {(record["iteration"], kind): record[kind] for record in records for kind in kinds if kind in record}
    wanted = {(iteration, kind): loss for iteration, kind, loss in EXPECTED["runs"][name]["losses"]}
    assert found == pytest.approx(wanted, rel=1e-4)  # two updates, sums in another processor's order


def test_what_was_trained_is_exported(tmp_path):
    assert run("export", "--load-dir", "runs/recovered", "--save-dir", tmp_path / "hf") == 0
    assert digests(tmp_path / "hf") == EXPECTED["runs"]["recovered"]["tensors"]
    assert_logits(tmp_path / "hf", EXPECTED["runs"]["recovered"]["logits"], atol=1e-4)


def test_an_adapter_is_exported_as_it_is_and_merged(tmp_path):
    words = ("export", "--load-dir", "runs/adapter", "--base", "m/llama_one", "--save-dir")
    assert run(*words, tmp_path / "none", "--adapter-only") == 2  # what peft is to load was not recorded
    assert run(*words, tmp_path / "peft", "--adapter-only", "--base-model-name", "hf/llama") == 0
    assert digests(tmp_path / "peft") == EXPECTED["runs"]["adapter"]["peft"]
    assert run(*words, tmp_path / "hf") == 0
    assert_logits(tmp_path / "hf", EXPECTED["runs"]["adapter"]["logits"], atol=1e-4)  # merged by arithmetic
