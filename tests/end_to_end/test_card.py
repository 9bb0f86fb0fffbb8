"""The card of a model that was made here: what its source's card says, what it was made from, and a program that runs."""

from __future__ import annotations

import json
import math
import re
import shutil
from pathlib import Path

import huggingface_hub.constants
import pytest
import rank_jobs_recovery as jobs
import yaml
from hub_stand_in import Hub, serving
from huggingface_hub import ModelCard
from tiny import TEXT, state_dict
from transformers import AutoTokenizer

from megatron_prune.checkpoint import megatron
from megatron_prune.checkpoint.manifest import Recipe
from megatron_prune.cli.main import main
from megatron_prune.files.documents import read_json
from megatron_prune.runtime.world import World

SOURCE_CARD = """---
language: [en, no]
license: other
license_name: tiny-1
license_link: LICENSE.txt
tags: [chat, "a: tag"]
base_model: ada/ancestor
datasets: [ada/text]
model-index: [{name: x}]
---
# The source
"""
TERMS = {"LICENSE.txt": "terms\r\n", "NOTICE": "notice", "USE_POLICY.md": "policy"}
CHAT = "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}{% endfor %}"


def run(*words: object) -> int:
    try:
        main([str(word) for word in words])
    except SystemExit as end:
        return end.code or 0
    return 0


def card_of(folder: Path) -> ModelCard:
    """Read by ``huggingface_hub``, without a word of complaint."""
    return ModelCard.load(folder / "README.md", ignore_metadata_errors=False)


def recipe_of(card: ModelCard) -> list[dict]:
    return yaml.safe_load(re.search(r"```yaml\n(.*?)\n```", card.text, re.DOTALL)[1])


def table(card: ModelCard) -> dict[str, list[str]]:
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in card.text.splitlines() if line.startswith("| ")]
    return {name: values for name, *values in rows}


@pytest.fixture
def program(monkeypatch, capsys):
    """``program(folder)`` runs the card's own program where the directory lies → what it prints."""

    def run_it(folder: Path) -> str:
        code = re.search(r"```python\n(.*?)\n```", card_of(folder).text, re.DOTALL)[1]
        monkeypatch.chdir(folder.parent)
        capsys.readouterr()
        exec(compile(code, "README.md", "exec"), {})
        return capsys.readouterr().out

    return run_it


@pytest.fixture(scope="module")
def home(tmp_path_factory, tiny) -> Path:
    """``cache``: a snapshot in a cache of the hub, converted as ``m``, pruned as ``p``, exported as ``hf``; text ``t.txt``."""
    home = tmp_path_factory.mktemp("home")
    source = home / "cache" / "models--ada--tiny" / "snapshots" / ("0" * 40)
    shutil.copytree(tiny("llama"), source)
    (source / "README.md").write_text(SOURCE_CARD, newline="")
    for name, text in TERMS.items():
        (source / name).write_text(text, newline="")
    tokenizer = AutoTokenizer.from_pretrained(source)
    tokenizer.chat_template = CHAT
    tokenizer.save_pretrained(source)
    (home / "t.txt").write_text(TEXT * 60)
    assert run("convert", "--load", source, "--save", home / "m") == 0
    words = ("--data", home / "t.txt", "--nsamples", 4, "--seq-length", 16, "--no-refit")
    assert run("prune", "--load", home / "m", "--save", home / "p", "--ffn-hidden-size-remain", 60, *words) == 0
    for name in ("m", "p"):
        evaluated = ("--data", home / "t.txt", "--seq-length", 32, "--windows", 4, "--output", home / f"{name}.json")
        assert run("evaluate", "--load", home / name, *evaluated) == 0
    files = ("--evaluations", home / "m.json", home / "p.json")
    assert run("export", "--load", home / "p", "--save", home / "hf", *files) == 0
    return home


# --------------------------------------------------------------------------------------------------------- what it says


def test_what_the_sources_card_says_goes_on_and_the_hubs_id_is_the_base(home):
    data = card_of(home / "hf").data
    assert data.to_dict() == {
        "base_model": "ada/tiny",
        "language": ["en", "no"],  # Norwegian, which YAML 1.1 takes for false
        "library_name": "transformers",
        "license": "other",
        "license_name": "tiny-1",
        "license_link": "LICENSE.txt",
        "pipeline_tag": "text-generation",
        "tags": ["chat", "a: tag", "pruned", "megatron-prune"],
    }
    assert yaml.safe_load(data.to_yaml()) == data.to_dict()
    assert {name: (home / "hf" / name).read_bytes().decode() for name in TERMS} == TERMS


def test_before_and_after_are_counted_and_measured(home):
    rows = table(card_of(home / "hf"))
    assert rows["ffn_hidden_size"] == ["96", "60"] and rows["hidden_size"] == ["48", "48"]
    source = home / "cache/models--ada--tiny/snapshots" / ("0" * 40)
    counts = [sum(value.numel() for value in state_dict(folder).values()) for folder in (source, home / "hf")]
    assert rows["parameters"] == [f"{count:,}" for count in counts]
    measured = [json.loads((home / f"{name}.json").read_text())["perplexity"] for name in ("m", "p")]
    assert rows["perplexity: t.txt, 4 windows of 32 tokens"] == [f"{value:.4g}" for value in measured]
    assert "Calibration: `t.txt`: 4 samples, 64 tokens" in card_of(home / "hf").text


def test_what_was_measured_of_directories_counts_as_well(home, tmp_path):
    """A content id is of values: the same of a directory and of the checkpoint that it was, or is going to be."""
    source = home / "cache/models--ada--tiny/snapshots" / ("0" * 40)
    for folder, known in ((source, "m"), (home / "hf", "p")):
        words = ("--data", home / "t.txt", "--seq-length", 16, "--windows", 2, "--output", tmp_path / f"{known}.json")
        assert run("evaluate", folder, *words) == 0
        ids = [json.loads((at / f"{known}.json").read_text())["content_id"] for at in (tmp_path, home)]
        assert ids[0] == ids[1] is not None
    files = ("--evaluations", tmp_path / "m.json", tmp_path / "p.json")
    assert run("export", "--load", home / "p", "--save", tmp_path / "hf", *files) == 0
    measured = [json.loads((tmp_path / f"{name}.json").read_text())["perplexity"] for name in ("m", "p")]
    assert table(card_of(tmp_path / "hf"))["perplexity: t.txt, 2 windows of 16 tokens"] == [f"{value:.4g}" for value in measured]


def test_the_recipe_is_readable_and_whole_without_this_machines_folders(home):
    card = card_of(home / "hf")
    told = Recipe.load(home / "hf")
    assert recipe_of(card) == told.recipe and told.base_model == "ada/tiny"
    assert [entry["step"] for entry in told.recipe] == ["convert", "prune", "evaluate", "evaluate"]
    for file in ("README.md", "megatron_prune_recipe.json"):
        assert str(home) not in (home / "hf" / file).read_text()


def test_the_cards_program_talks(home, program):
    assert "<user>What is a kilobyte?" in program(home / "hf")
    assert "trust_remote_code" not in card_of(home / "hf").text


def test_the_hubs_own_check_takes_it(home, monkeypatch):
    """``ModelCard.validate`` asks the hub: here a stand-in with some of its rules."""
    hub = Hub()
    with serving(hub) as address:
        monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", address)
        card_of(home / "hf").validate()
        with pytest.raises(ValueError, match="license_name"):
            ModelCard("---\nlicense: other\n---\n").validate()


def test_it_goes_on_through_a_way_back_another_cut_and_without_megatron(home, tmp_path):
    assert run("convert", "--load", home / "hf", "--save", tmp_path / "m") == 0
    manifest = megatron.open_checkpoint(tmp_path / "m").manifest
    assert manifest.base_model == "ada/tiny" and manifest.converted_from == str(home / "hf")
    words = ("--load", tmp_path / "m", "--remain-vocab-size", 290, "--save", tmp_path / "t")
    assert run("vocab", "trim", *words) == run("export", "--load", tmp_path / "t", "--save", tmp_path / "hf") == 0
    words = ("--remain-vocab-size", 290, "--save", tmp_path / "hf2")
    assert run("vocab", "trim", "--load", home / "hf", *words) == 0
    for folder in (tmp_path / "hf", tmp_path / "hf2"):
        card = card_of(folder)
        assert card.data.to_dict() == card_of(home / "hf").data.to_dict()
        assert table(card)["ffn_hidden_size"] == ["96", "60"] and table(card)["vocab_size"] == ["307", "290"]
        assert all((folder / name).read_bytes() == text.encode() for name, text in TERMS.items())
        assert table(card)["perplexity: t.txt, 4 windows of 32 tokens"][1] == "not measured"


def test_nothing_is_replaced_where_nothing_was_changed(home, tmp_path):
    assert run("export", "--load", home / "m", "--save", tmp_path / "back") == 0
    assert (tmp_path / "back/README.md").read_bytes() == SOURCE_CARD.encode()


def test_a_per_layer_model_says_what_runs_it(tiny, tmp_path, program):
    sizes = ("--load", tiny("llama"), "--drop-mlp", "1", "--metric", "magnitude")
    for form in ("llama-per-layer", "nemotron-nas"):
        assert run("prune-hf", *sizes, "--save", tmp_path / form, "--target-family", form) == 0
    assert "trust_remote_code=True" in card_of(tmp_path / "llama-per-layer").text
    assert "A kilobyte is" in program(tmp_path / "llama-per-layer")
    text = card_of(tmp_path / "nemotron-nas").text
    assert "--trust-remote-code" in text and "```python" not in text


def test_evaluations_of_another_model_are_refused(home, tmp_path, capsys):
    other = {**json.loads((home / "m.json").read_text()), "content_id": "another"}
    (tmp_path / "other.json").write_text(json.dumps(other))
    words = ("export", "--save", tmp_path / "hf", "--evaluations")
    assert run(*words, tmp_path / "other.json", "--load", home / "p") == 2
    assert "other.json is of another model" in capsys.readouterr().err
    (tmp_path / "none.json").write_text(json.dumps({**other, "perplexity": "low"}))
    assert run(*words, tmp_path / "none.json", "--load", home / "p") == 2
    assert run(*words, home / "m.json", "--load", home / "m") == 2
    assert "its own card stays" in capsys.readouterr().err and not (tmp_path / "hf").exists()


# ------------------------------------------------------------------------------------------------- where it was made from

SOURCES = {
    "its config says an id": ({"_name_or_path": "ada/small"}, None, "ada/small"),
    "its config says a path": ({"_name_or_path": "/home/ada/small"}, None, None),
    "its config says a place": ({"_name_or_path": "./small"}, None, None),
    "its card knows more": ({}, "---\nbase_model: [ada/one, ada/two]\n---\n", ["ada/one", "ada/two"]),
    "its card says no id": ({}, "---\nbase_model: ../../etc\n---\n", None),
    "both, the config first": ({"_name_or_path": "ada/small"}, "---\nbase_model: ada/one\n---\n", "ada/small"),
}


@pytest.mark.parametrize("case", SOURCES)
def test_the_base_of_a_plain_directory_is_what_it_says_or_left_out(tiny, tmp_path, case):
    config, card, expected = SOURCES[case]
    source = tmp_path / "source"
    shutil.copytree(tiny("llama"), source)
    told = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps({**told, **config}))
    if card:
        (source / "README.md").write_text(card)
    (tmp_path / "sizes.json").write_text('{"ffn_hidden_size_remain": 60}')
    words = ("--save", tmp_path / "hf", "--prune_config_path", tmp_path / "sizes.json", "--metric", "random")
    assert run("prune-hf", "--load", source, *words) == 0
    assert card_of(tmp_path / "hf").data.base_model == expected


BROKEN = {
    "no YAML": b"---\nlicense: [mit\n---\n",
    "no text": b"---\nlicense: \xff\xfe\n---\n",
    "an object": b"---\nlicense: !!python/object/apply:os.system ['touch harm']\n---\n",
    "a mapping": b"---\nlicense: {a: mit}\n---\n",
    "nested without end": b"---\n" + b"[" * 100_000 + b"\n---\n",
    "laughs": b"---\na: &a [x, x]\nb: &b [*a, *a]\nlicense: [*b, *b]\n---\n",
    "too long": b"---\nlicense: mit\n---\n" + b"x" * (1 << 22),
}


@pytest.mark.parametrize("case", BROKEN)
def test_a_card_that_cannot_be_read_is_one_warning(home, tmp_path, monkeypatch, capsys, case):
    shutil.copytree(home / "p", tmp_path / "p")
    (tmp_path / "p/release/hf/README.md").write_bytes(BROKEN[case])
    monkeypatch.chdir(tmp_path)
    assert run("export", "--load", tmp_path / "p", "--save", tmp_path / "hf") == 0
    assert capsys.readouterr().err.count("not taken over into the new model's card") == 1
    data = card_of(tmp_path / "hf").data
    assert (data.license, data.base_model) == (None, "ada/tiny") and not (tmp_path / "harm").exists()


def test_what_a_card_says_is_plain_text_on_one_line(home, tmp_path):
    shutil.copytree(home / "p", tmp_path / "p")
    odd = '---\nlicense_name: "a\\e[31m\\0b\\nc: d\\n---\\n# no"\ntags: ["```\\nx", null, ""]\nlicense: null\n---\n'
    (tmp_path / "p/release/hf/README.md").write_text(odd)
    assert run("export", "--load", tmp_path / "p", "--save", tmp_path / "hf") == 0
    card = card_of(tmp_path / "hf")
    assert card.data.license_name == "a?b c: d --- # no" and card.data.license is None
    assert card.data.tags == ["``` x", "pruned", "megatron-prune"]
    assert card.text.lstrip().startswith("# hf")


# -------------------------------------------------------------------------------------------------------------- recovery


def test_a_fitted_model_says_what_was_held_out(home, tmp_path):
    words = ("--data", home / "t.txt", "--nsamples", 8, "--seq-length", 16)
    assert run("prune", "--load", home / "m", "--save", tmp_path / "p", "--ffn-hidden-size-remain", 60, *words) == 0
    assert run("export", "--load", tmp_path / "p", "--save", tmp_path / "hf") == 0
    losses = Recipe.load(tmp_path / "hf").recipe[-1]["held_out_loss"]
    assert set(losses) == {"before", "after"} and 0 < losses["before"] < losses["after"] < 20
    shown = [
        " → ".join(form(losses[at]) for at in ("before", "after"))
        for form in (lambda x: f"{x:.4f}", lambda x: f"{math.exp(x):.4g}")
    ]
    said = f"- Pruning, on samples held out of the calibration: loss {shown[0]} nats a token (perplexity {shown[1]})."
    assert said in card_of(tmp_path / "hf").text


def test_a_recovered_model_is_a_finetune_and_says_its_losses(home, tmp_path):
    (tmp_path / "docs.jsonl").write_text("".join(json.dumps({"text": TEXT * 3}) + "\n" for _ in range(40)))
    words = ("--tokenizer", home / "m/release/hf", "--input", tmp_path / "docs.jsonl", "--workers", 1)
    assert run("preprocess", *words, "--output-prefix", tmp_path / "x") == 0
    options = {"load": str(home / "p"), "save": str(tmp_path / "run"), "data_path": (str(tmp_path / "x_text_document"),)}
    options |= {
        "split": "80,20,0",
        "seq_length": 16,
        "train_iters": 3,
        "global_batch_size": 2,
        "eval_iters": 1,
        "save_interval": 3,
    }
    assert jobs.recover(World(), options) == 0
    assert run("export", "--load", tmp_path / "run", "--save", tmp_path / "hf") == 0
    card, summary = card_of(tmp_path / "hf"), read_json(tmp_path / "run/summary.json")
    assert card.data.to_dict()["base_model_relation"] == "finetune" and card.data.base_model == "ada/tiny"
    losses = [summary["start_loss"], summary["held_out_loss"]]
    shown = [" → ".join(f"{loss:.4f}" for loss in losses), " → ".join(f"{math.exp(loss):.4g}" for loss in losses)]
    said = f"3 steps, 96 tokens of `x_text_document`; held-out loss {shown[0]} nats a token (perplexity {shown[1]})"
    assert said in card.text and "pruned and trained with megatron-prune" in card.text
    assert "lora_" not in (tmp_path / "hf/README.md").read_text()  # nothing of adapters where there were none
    assert str(tmp_path) not in card.text
    measured = ("--data", home / "t.txt", "--seq-length", 32, "--windows", 4, "--output")
    assert run("export", "--load", tmp_path / "run", "--save", tmp_path / "half", "--target-params-dtype", "bf16") == 0
    assert run("evaluate", tmp_path / "half", *measured, tmp_path / "half.json") == 0
    assert run("convert", "--load", tmp_path / "half", "--save", tmp_path / "again") == 0
    ids = {megatron.open_checkpoint(tmp_path / name).manifest.content_id for name in ("again", "run/best")}
    assert ids == {json.loads((tmp_path / "half.json").read_text())["content_id"]}
    files = ("--evaluations", home / "m.json", tmp_path / "half.json")
    assert run("export", "--load", tmp_path / "run", "--save", tmp_path / "told", *files) == 0
    values = [json.loads(Path(file).read_text())["perplexity"] for file in files[1:]]
    assert table(card_of(tmp_path / "told"))["perplexity: t.txt, 4 windows of 32 tokens"] == [f"{x:.4g}" for x in values]
