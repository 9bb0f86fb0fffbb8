"""``--push-to-hub`` against a stand-in of the hub: what arrives is the directory; what cannot be done is refused before work."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import huggingface_hub.constants
import pytest
import rank_jobs_push
from hub_stand_in import TOKEN, Hub, serving

from megatron_prune.cli.main import main

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def hub(monkeypatch):
    """A stand-in that this process takes for the hub, with its token."""
    hub = Hub()
    with serving(hub) as address:
        monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", address)
        monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_DISABLE_XET", True)
        monkeypatch.setenv("HF_TOKEN", TOKEN)
        hub.address = address
        yield hub


@pytest.fixture(scope="module")
def pruned(tiny, tmp_path_factory) -> Path:
    """A Megatron checkpoint of a pruned model."""
    home = tmp_path_factory.mktemp("pruned")
    assert run("convert", "--load", tiny("llama"), "--save", home / "m") == 0
    assert run("prune", "--load", home / "m", "--save", home / "p", "--ffn-hidden-size-remain", 60, "--metric", "magnitude") == 0
    return home / "p"


def run(*words: object) -> int:
    try:
        main([str(word) for word in words])
    except SystemExit as end:
        return end.code or 0
    return 0


def content(folder: Path) -> dict[str, bytes]:
    return {str(file.relative_to(folder)): file.read_bytes() for file in folder.rglob("*") if file.is_file()}


# ------------------------------------------------------------------------------------------------------------ what arrives


def test_the_bytes_that_arrive_are_the_directorys_and_nobody_else_sees_them(hub, pruned, tmp_path):
    save = tmp_path / "hf"
    assert run("export", "--load", pruned, "--save", save, "--push-to-hub", "lab/small") == 0
    assert hub.repos.keys() == {"lab/small"} and hub.repos["lab/small"]["private"] is True
    assert hub.repos["lab/small"]["files"] == content(save)
    assert hub.large and "model.safetensors" in content(save)
    assert '"lab/small"' in (save / "README.md").read_text()  # the card's program names the repository


def test_a_name_without_an_owner_is_the_users_and_public_is_said(hub, tiny, tmp_path):
    words = ("--prune_config_path", tmp_path / "sizes.json", "--metric", "magnitude", "--push-to-hub", "small", "--push-public")
    (tmp_path / "sizes.json").write_text('{"ffn_hidden_size_remain": 60}')
    assert run("prune-hf", "--load", tiny("llama"), "--save", tmp_path / "hf", *words) == 0
    assert hub.repos.keys() == {"ada/small"} and hub.repos["ada/small"]["private"] is False
    assert hub.repos["ada/small"]["files"] == content(tmp_path / "hf")


def test_a_second_upload_takes_the_place_of_the_first_whatever_its_files_are_called(hub, pruned, tmp_path):
    hub.repos["ada/small"] = {"private": True, "files": {"notes.md": b"mine", "extra.safetensors": b"mine too"}}
    for name, size in (("one", "5GB"), ("many", "100KB")):
        words = ("--max-shard-size", size, "--push-to-hub", "ada/small")
        assert run("export", "--load", pruned, "--save", tmp_path / name, *words) == 0
    assert "model.safetensors.index.json" in content(tmp_path / "many")
    mine = {"notes.md": b"mine", "extra.safetensors": b"mine too"}
    assert hub.repos["ada/small"]["files"] == content(tmp_path / "many") | mine


def test_of_a_fine_grained_token_the_hub_decides_what_it_may(hub, pruned, tmp_path):
    hub.role = "fineGrained"
    assert run("export", "--load", pruned, "--save", tmp_path / "hf", "--push-to-hub", "team/small") == 0
    assert hub.repos["team/small"]["files"] == content(tmp_path / "hf")


def test_a_trimmed_model_and_a_trimmed_tokenizer(hub, tiny, tmp_path):
    words = ("vocab", "trim", "--load", tiny("llama"), "--remain-vocab-size", "290")
    assert run(*words, "--save", tmp_path / "hf", "--push-to-hub", "ada/trimmed") == 0
    assert hub.repos["ada/trimmed"]["files"] == content(tmp_path / "hf")
    assert run(*words, "--save", tmp_path / "t", "--tokenizer-only", "--push-to-hub", "ada/tokens") == 0
    assert hub.repos["ada/tokens"]["files"] == content(tmp_path / "t") and "config.json" in content(tmp_path / "t")


def test_under_two_processes_the_first_uploads_and_both_end_alike(hub, pruned, tmp_path, ranks):
    options = {"load": str(pruned), "push_to_hub": "small"}
    said = ranks(2).run(rank_jobs_push.export_to, hub.address, {**options, "save": str(tmp_path / "hf")})
    assert said == [None, None]
    assert hub.repos["ada/small"]["files"] == content(tmp_path / "hf")
    paths = [path for _, path in hub.requests]
    assert paths.count("/api/models/ada/small/commit/main") == paths.count("/api/whoami-v2") == 1
    hub.refused["/commit/"] = 400
    said = ranks(2).run(rank_jobs_push.export_to, hub.address, {**options, "save": str(tmp_path / "again")})
    assert said[0] == said[1] and said[0].startswith(f"PruneError: {tmp_path / 'again'} is written and complete")
    hub.role = "read"
    said = ranks(2).run(rank_jobs_push.export_to, hub.address, {**options, "save": str(tmp_path / "no")})
    assert said[0] == said[1] and said[0].startswith("InputError: --push-to-hub") and not (tmp_path / "no").exists()


def test_the_program_itself_asks_the_hub_of_its_environment(hub, pruned, tmp_path):
    words = ["export", "--load", pruned, "--save", tmp_path / "hf", "--push-to-hub", "ada/small"]
    environment = {
        **os.environ,
        "HF_ENDPOINT": hub.address,
        "HF_HUB_DISABLE_XET": "1",
        "PYTHONPATH": str(ROOT),
        "HF_TOKEN": TOKEN,
    }
    command = [sys.executable, "-m", "megatron_prune", *map(str, words)]
    ended = subprocess.run(command, env=environment, capture_output=True, text=True, stdin=subprocess.DEVNULL, timeout=120)
    assert ended.returncode == 0 and "uploaded to ada/small" in ended.stderr
    assert "%|" not in ended.stderr and TOKEN not in ended.stderr + ended.stdout  # no bars of other libraries without a terminal
    assert hub.repos["ada/small"]["files"] == content(tmp_path / "hf")


# ------------------------------------------------------------------------------------------------------------ what does not


@pytest.mark.parametrize("part", ["/repos/create", "/preupload/", "/lfs/objects/batch", "/commit/"])
def test_an_upload_that_fails_leaves_the_model_and_says_what_uploads_it(hub, pruned, tmp_path, capsys, part):
    hub.refused[part] = 400
    save = tmp_path / "h f"
    assert run("export", "--load", pruned, "--save", save, "--push-to-hub", "ada/small") == 1
    said = capsys.readouterr().err
    assert "is written and complete, but was not uploaded to ada/small" in said
    assert f"hf upload ada/small '{save}' . --private" in said
    whole = tmp_path / "whole"
    assert run("export", "--load", pruned, "--save", whole) == 0
    assert content(save).keys() == content(whole).keys()
    assert content(save)["model.safetensors"] == content(whole)["model.safetensors"]


REFUSALS = {
    "no token": ({"token": None}, ["ada/small"], "got: no token of the hub"),
    "another token": ({"token": "hf_of_another"}, ["ada/small"], "the hub cannot be asked"),
    "no hub": ({"refused": {"/whoami": 500}}, ["ada/small"], "the hub cannot be asked"),
    "a token that reads": ({"role": "read"}, ["ada/small"], "got: a token that can only read"),
    "another's name": ({}, ["grace/small"], "needed: one of ada, lab"),
    "no id": ({}, ["a/b/c"], "--push-to-hub\n  got: 'a/b/c'"),
    "a path": ({}, ["./out"], "got: './out'"),
    "a public one": ({"repos": {"ada/small": {"private": False, "files": {}}}}, ["ada/small"], "pass --push-public"),
}


@pytest.mark.parametrize("case", REFUSALS)
def test_what_cannot_be_uploaded_is_refused_before_work(hub, pruned, tmp_path, monkeypatch, capsys, case):
    changes, words, message = REFUSALS[case]
    for name, value in changes.items():
        if name != "token":
            setattr(hub, name, value)
        elif value:
            monkeypatch.setenv("HF_TOKEN", value)
        else:
            monkeypatch.delenv("HF_TOKEN")
            monkeypatch.setattr(huggingface_hub.constants, "HF_TOKEN_PATH", str(tmp_path / "none"))
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("it asks"))
    before = dict(hub.repos)
    assert run("export", "--load", pruned, "--save", tmp_path / "hf", "--push-to-hub", *words) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "hf").exists() and hub.repos == before


def test_options_without_effect_are_refused(hub, pruned, tmp_path, capsys):
    assert run("export", "--load", pruned, "--save", tmp_path / "hf", "--push-public") == 2
    assert "--push-public without --push-to-hub" in capsys.readouterr().err
    words = ("--remain-vocab-size", 290, "--push-to-hub", "ada/small")
    assert run("vocab", "trim", "--load", pruned, "--save", tmp_path / "t", *words) == 2
    assert "a Megatron checkpoint is written" in capsys.readouterr().err
    assert not hub.requests


def test_the_machine_that_is_off_line_says_so(pruned, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    assert run("export", "--load", pruned, "--save", tmp_path / "hf", "--push-to-hub", "ada/small") == 2
    assert "HF_HUB_OFFLINE" in capsys.readouterr().err
