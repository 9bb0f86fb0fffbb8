"""Text of a family that needs it begins with BOS: which token that is, and that nothing measured otherwise passes for it."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from tiny import TEXT

from megatron_prune.errors import InputError
from megatron_prune.opening.opened import Opened, open_huggingface
from megatron_prune.runtime.world import World
from megatron_prune.steps.convert import ConvertOptions, convert
from megatron_prune.steps.evaluate import EvaluateOptions, evaluate
from megatron_prune.steps.prune import PruneOptions, prune
from megatron_prune.steps.score import ScoreOptions, score


def edited(folder: Path, path: Path, **files: dict | None) -> Path:
    """A copy of a directory, with keys of JSON files changed; ``None`` removes one."""
    shutil.copytree(folder, path)
    for name, changes in files.items():
        file = path / f"{name}.json"
        held = json.loads(file.read_text()) | changes
        file.write_text(json.dumps({key: value for key, value in held.items() if value is not None}))
    return path


def test_which_token_it_is(tiny, tmp_path):
    gemma, llama = tiny("gemma3_text"), tiny("llama")
    assert open_huggingface(gemma, World()).leading == 0 and open_huggingface(llama, World()).leading is None
    tokens = json.loads((gemma / "tokenizer.json").read_text())["added_tokens"]
    assert {token["content"]: token["id"] for token in tokens} == {"<s>": 0, "</s>": 1}
    of_tokenizer = {"config": {"bos_token_id": None}, "tokenizer_config": {"bos_token": "</s>"}}
    assert open_huggingface(edited(gemma, tmp_path / "of_tokenizer", **of_tokenizer), World()).leading == 1
    as_entry = {"config": {"bos_token_id": None}, "tokenizer_config": {"bos_token": {"content": "<s>"}}}
    assert open_huggingface(edited(gemma, tmp_path / "as_entry", **as_entry), World()).leading == 0
    none = edited(gemma, tmp_path / "none", config={"bos_token_id": None}, tokenizer_config={"bos_token": None})
    with pytest.raises(InputError, match="begins with its BOS token\\s+got: no bos_token_id(.|\n)*--tokenizer"):
        open_huggingface(none, World()).leading  # noqa: B018


@pytest.fixture(scope="module")
def home(tiny, tmp_path_factory) -> Path:
    """``m``: a Gemma at TP 1, and ``text.txt``."""
    home = tmp_path_factory.mktemp("bos")
    convert(ConvertOptions(load=str(tiny("gemma3_text", dtype="float32")), save=str(home / "m")), World())
    (home / "text.txt").write_text(TEXT * 20)
    return home


def scores(home: Path, save: Path) -> Path:
    text = {"data": (f"{home / 'text.txt'}:1",), "nsamples": 4, "seq_length": 16}
    score(ScoreOptions(load=str(home / "m"), save=str(save), metrics=("activation",), **text), World())
    return save


def test_scores_of_text_without_it_do_not_serve(home, tmp_path, monkeypatch):
    with monkeypatch.context() as before:
        before.setattr(Opened, "leading", None)
        scores(home, tmp_path / "old")
    scores(home, tmp_path / "new")
    options = {"load": str(home / "m"), "ffn_hidden_size_remain": 40, "reconstruct": 0, "metric": "activation"}
    with pytest.raises(InputError, match="old was measured on samples that do not begin with the BOS token"):
        prune(PruneOptions(save=str(tmp_path / "out"), scores=str(tmp_path / "old"), **options), World())
    assert not (tmp_path / "out").exists()
    prune(PruneOptions(save=str(tmp_path / "out"), scores=str(tmp_path / "new"), **options), World())


def test_a_stopped_run_without_it_is_begun_anew(home, tmp_path, monkeypatch):
    """Work that an earlier version left does not pass for what is asked for now."""
    with monkeypatch.context() as before:
        before.setattr(Opened, "leading", None)
        before.setattr("megatron_prune.steps.score.save_scores", lambda *words: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            scores(home, tmp_path / "s")
    calibration = json.loads((scores(home, tmp_path / "s") / "calibration.json").read_text())
    assert "leading" in json.dumps(calibration)


def test_evaluations_say_it(home, tmp_path):
    settings = {"data": str(home / "text.txt"), "windows": 1, "seq_length": 16, "output": str(tmp_path / "e.json")}
    evaluate(EvaluateOptions(load=str(home / "m"), **settings), World())
    assert json.loads((tmp_path / "e.json").read_text())["begins_with_bos"] is True
