"""Damaged files of our own and of models: exit code 2, a message with file and field, in bounded time, nothing written."""

from __future__ import annotations

import json
import os
import re
import shutil
from pathlib import Path

import numpy
import pytest
import torch
from safetensors.torch import load_file, save_file

from megatron_prune.cli.main import main
from megatron_prune.runtime.world import World
from megatron_prune.steps.convert import ConvertOptions, convert

NESTED = "[" * 200_000


@pytest.fixture(scope="module")
def made(tiny, tmp_path_factory):
    """A model (``hf``), its checkpoint (``m``), text, scores and samples; no test changes them."""
    home = tmp_path_factory.mktemp("made")
    shutil.copytree(tiny("qwen2"), home / "hf")
    convert(ConvertOptions(load=str(home / "hf"), save=str(home / "m")), World())
    (home / "text.txt").write_text("A small text for a small tokenizer. " * 60)
    text = ["--data", str(home / "text.txt:1"), "--nsamples", "2", "--seq-length", "16"]
    main(["score", "--load", str(home / "m"), "--save", str(home / "scores"), "--metrics", "activation", *text])
    return home


@pytest.fixture
def refused(tmp_path, capfd):
    """``refused(words, pattern)``: exit code 2, a message with the pattern, no traceback, no output."""

    def check(words: list, pattern: str) -> str:
        capfd.readouterr()
        with pytest.raises(SystemExit) as left:
            main([str(word) for word in words])
        said = capfd.readouterr().err
        assert left.value.code == 2 and "Traceback" not in said, said
        assert re.search(pattern, said, re.DOTALL), f"{pattern!r} is not in:\n{said}"
        assert not [path for path in tmp_path.iterdir() if "out" in path.name]
        return said

    return check


def damaged(made: Path, tmp_path: Path, name: str) -> Path:
    return Path(shutil.copytree(made / name, tmp_path / name))


# ------------------------------------------------------------------------------------------------- manifest and tracker


def field(*way, value):
    def change(data):
        for step in way[:-1]:
            data = data[step]
        data[way[-1]] = value

    return change


MANIFESTS = {
    "no family": (field("family", value=None), "megatron_prune.json: family\n  got: None\n  needed: a valid string"),
    "no recipe": (field("recipe", value=None), "megatron_prune.json: recipe\n  got: None"),
    "a recipe of numbers": (field("recipe", value=[3]), "recipe.0\n  got: 3"),
    "a step without a name": (field("recipe", value=[{"step": 1}]), "recipe.0.step"),
    "an adapter that is a text": (field("adapter", value="x"), "adapter\n  got: 'x'"),
    "no ranks": (field("parallel", "tensor", value=0), "parallel.*tensor\n  got: 0"),
    "less than no ranks": (field("parallel", "pipeline", value=-1), "pipeline\n  got: -1"),
    "too many ranks": (field("parallel", "tensor", value=10**20), "tensor\n  got: 1000.*at most"),
    "too many layers": (field("model", "num_layers", value=10**20), "num_layers\n  got: 1000.*at most"),
    "half a layer": (field("model", "num_layers", value=2.5), "model.num_layers\n  got: 2.5"),
    "NaN": (field("model", "norm_epsilon", value=float("nan")), "model.norm_epsilon\n  got: nan"),
    "an unknown size": (field("model", "depth", value=3), "model.depth.*no field of that name"),
    "scaling that is none": (field("model", "rope_scaling", value=[1]), "model.rope_scaling"),
    "a dtype that is none": (field("hf_dtypes", value={"default": "int4"}), "hf_dtypes.default\n  got: 'int4'"),
    "fewer kept layers": (field("kept_layers", value=[0]), "kept_layers\n  got: 1 layers\n  needed: the model's 4"),
    "another version": (field("version", value=True), "version True"),
    "another format": (field("format", value="x"), "something else"),
    "a deep field": (field("content_id", value=json.loads("[" * 150 + "]" * 150)), "content_id"),
}


@pytest.mark.parametrize("case", MANIFESTS)
def test_manifests(made, tmp_path, refused, case):
    folder = damaged(made, tmp_path, "m")
    file = folder / "release/megatron_prune.json"
    data = json.loads(file.read_text())
    MANIFESTS[case][0](data)
    file.write_text(json.dumps(data))
    refused(["export", "--load-dir", folder, "--save-dir", tmp_path / "out"], MANIFESTS[case][1])


@pytest.mark.parametrize("content", [b"", b"\xff", b"nonsense", b"null", NESTED.encode(), b"{}"])
def test_a_manifest_that_is_no_json_object(made, tmp_path, refused, content):
    folder = damaged(made, tmp_path, "m")
    (folder / "release/megatron_prune.json").write_bytes(content)
    refused(["transfer", "--load-dir", folder, "--save-dir", tmp_path / "out"], "megatron_prune.json")


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"\xff", "latest_checkpointed_iteration.txt is not UTF-8"),
        (b"9" * 400, "latest_checkpointed_iteration.txt\n  got: '9999"),
        (b"9" * 100_000, "latest_checkpointed_iteration.txt\n  got: 100000 bytes"),
        (b"-1", "got: '-1'"),
        (b"../x", r"got: '\.\./x'"),
        ("٣".encode(), "got: '٣'"),
        (b"", "got: ''"),
        (b"12", "names iter_0000012"),
    ],
)
def test_trackers(made, tmp_path, refused, content, said):
    folder = damaged(made, tmp_path, "m")
    (folder / "latest_checkpointed_iteration.txt").write_bytes(content)
    refused(["inspect", folder], said)


def test_rotary_tables_that_are_none(made, tmp_path, refused):
    folder = damaged(made, tmp_path, "m")
    file = folder / "release/hf/rotary_buffers.safetensors"
    words = ["export", "--load-dir", folder, "--save-dir", tmp_path / "out"]
    file.write_bytes(b"junk")
    refused(words, "rotary_buffers.safetensors is not a whole safetensors file")
    save_file({"model.norm.weight": torch.ones(2)}, file)
    refused(words, "rotary_buffers.safetensors holds what is no table of positions or masks")


# ------------------------------------------------------------------------------------------------------- scores and text


def scores(change):
    def apply(folder: Path):
        held = load_file(folder / "scores.safetensors")
        change(held)
        save_file(held, folder / "scores.safetensors")

    return apply


def text(change):
    def apply(folder: Path):
        held = load_file(folder / "calibration.safetensors")
        change(held)
        save_file(held, folder / "calibration.safetensors")

    return apply


def manifest(**changes):
    return lambda folder: (folder / "scores.json").write_text(
        json.dumps(json.loads((folder / "scores.json").read_text()) | changes)
    )


FFN = "activation.ffn.0"
SCORES = {
    "a short vector": (
        scores(lambda s: s.update({FFN: s[FFN][:5].clone()})),
        f"{FFN}'\n  got: torch.float64 .5.\n  needed: .*96",
    ),
    "a long vector": (scores(lambda s: s.update({FFN: s[FFN].repeat(2)})), f"{FFN}'\n  got: torch.float64 .192."),
    "NaN": (scores(lambda s: s[FFN].fill_(torch.nan)), f"{FFN}'\n  got: NaN or infinity"),
    "infinity": (scores(lambda s: s[FFN][:1].fill_(torch.inf)), f"{FFN}'\n  got: NaN or infinity"),
    "less than nothing": (
        scores(lambda s: s[FFN][:1].fill_(-1e9)),
        f"{FFN}'\n  got: -1000000000.0\n  needed: activation is never",
    ),
    "single precision": (scores(lambda s: s.update({FFN: s[FFN].float()})), f"{FFN}'\n  got: torch.float32"),
    "a layer missing": (scores(lambda s: s.pop("activation.ffn.2")), "lacks the tensor 'activation.ffn.2'"),
    "another layer": (
        scores(lambda s: s.update({"activation.ffn.99": s[FFN].clone()})),
        "activation.ffn.99'\n  got: another name",
    ),
    "no axis": (scores(lambda s: s.update({"activation": s[FFN].clone()})), "'activation'\n  got: another name"),
    "metrics that are a text": (manifest(metrics="activation"), "scores.json: metrics\n  got: 'activation'"),
    "an unknown metric": (manifest(metrics=["beauty"]), "unknown metric 'beauty'"),
    "sizes that are none": (manifest(model={"num_layers": 4}), "scores.json: model.*needed: sizes of num_layers"),
    "a size that is a text": (manifest(model={"num_layers": "4"}), "model.num_layers\n  got: '4'"),
    "no digest": (manifest(content_id=None), "content_id\n  got: None"),
    "junk": (lambda folder: (folder / "scores.safetensors").write_bytes(b"junk"), "scores.safetensors is not a whole"),
    "nested": (lambda folder: (folder / "scores.json").write_text(NESTED), "scores.json is not JSON"),
    "a pipe": (lambda folder: ((folder / "scores.json").unlink(), os.mkfifo(folder / "scores.json")), "a pipe or a device"),
    "tokens beyond": (text(lambda t: t["tokens"].fill_(10**9)), "'tokens'\n  got: token 1000000000\n  needed: 0 to 306"),
    "tokens below": (text(lambda t: t["tokens"].fill_(-1)), "'tokens'\n  got: -1"),
    "weights of nothing": (text(lambda t: t["weights"].fill_(torch.nan)), "'weights'\n  got: NaN"),
    "weights below": (text(lambda t: t["weights"].fill_(-1)), "calibration.safetensors: weights.*positive"),
    "lengths beyond": (text(lambda t: t["lengths"].fill_(99)), "calibration.safetensors: a sample"),
    "sources that are none": (lambda folder: (folder / "calibration.json").write_text("3"), "calibration.json\n  got: 3"),
}


@pytest.mark.parametrize("case", SCORES)
def test_scores(made, tmp_path, refused, case):
    folder = damaged(made, tmp_path, "scores")
    SCORES[case][0](folder)
    words = ["--scores", folder, "--metric", "activation", "--ffn_hidden_size_remain", "48"]
    refused(["prune", "--load", made / "m", "--save", tmp_path / "out", *words], SCORES[case][1])


# ------------------------------------------------------------------------------------------------------------- templates


@pytest.mark.parametrize(
    ("template", "said"),
    [
        ("{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}", "does not end\n  needed: 1 seconds"),
        ("{{ 'a' * 200000000 }}", "beyond all limits\n  got: too much memory"),
        ("{{ '%0999999999d' % 1 }}", "too much memory"),
        ("{{ 9 ** 99999 }}", "too much size of numbers"),
        ("{% macro f(x) %}{{ f(x) }}{% endmacro %}{{ f(1) }}", "too much depth"),
        ("{{ " + "(" * 4000 + "1" + ")" * 4000 + " }}", "too much depth"),
    ],
)
def test_templates_end(made, tmp_path, refused, template, said, monkeypatch):
    monkeypatch.setattr("megatron_prune.vocabulary.templates.SECONDS", 1)
    folder = damaged(made, tmp_path, "hf")
    config = json.loads((folder / "tokenizer_config.json").read_text())
    (folder / "tokenizer_config.json").write_text(json.dumps({**config, "chat_template": template}))
    words = ["vocab", "select", "--load-dir", folder, "--remain-vocab-size", 300]
    refused(words, f"the chat template in .*tokenizer_config.json .*{said}")


# ------------------------------------------------------------------------------------------------------------ tokenizers

TOKENIZERS = {
    "a panic": (field("normalizer", value={"type": "Precompiled", "precompiled_charsmap": "AAAA"}), "refused by tokenizers"),
    "an id of 10^18": (field("added_tokens", 0, "id", value=10**18), "tokenizer"),
    "an id that is none": (field("added_tokens", 0, "id", value="0"), "added_tokens.0.id\n  got: '0'"),
    "a negative id": (field("model", "vocab", "a", value=-1), "model.vocab.a\n  got: -1"),
    "merges of three": (field("model", "merges", value=[["a", "b", "c"]]), "model.merges.0"),
    "a model that is none": (field("model", value=7), "model\n  got: 7"),
    "a dropout of NaN": (field("model", "dropout", value=float("nan")), "model.dropout\n  got: nan"),
    "a long token": (lambda data: data["model"]["vocab"].update({"é" * 5000: 310}), "a token of 5000 symbols"),
}


@pytest.mark.parametrize("case", TOKENIZERS)
def test_tokenizers(made, tmp_path, refused, case):
    folder = damaged(made, tmp_path, "hf")
    data = json.loads((folder / "tokenizer.json").read_text())
    TOKENIZERS[case][0](data)
    (folder / "tokenizer.json").write_text(json.dumps(data))
    for file in ("config.json", *(path.name for path in folder.glob("*.safetensors"))):
        (folder / file).unlink()
    (folder / "words.txt").write_text("a small text\n")
    words = ["vocab", "select", "--load-dir", folder, "--remain-vocab-size", 300, "--held-out", folder / "words.txt"]
    assert "panicked" not in refused([*words, "--keep", folder / "words.txt"], TOKENIZERS[case][1])


# ------------------------------------------------------------------------------------------------------ maps and counts


def archive(path: Path, **tables) -> Path:
    whole = {
        "new_to_old": numpy.arange(3),
        "starts": numpy.arange(5),
        "pieces": numpy.array([0, 1, 2, 0]),
        "tokenizer": numpy.array("x"),
    }
    with open(path, "wb") as file:
        numpy.savez_compressed(file, **{**whole, **tables})
    return path


MAPS = {
    "objects": {"pieces": numpy.array([{}], dtype=object)},
    "floats": {"starts": numpy.arange(5) / 1.0},
    "nothing": {"new_to_old": numpy.arange(0)},
    "below": {"new_to_old": numpy.array([-1, 0, 1])},
    "beyond": {"pieces": numpy.array([0, 1, 2, 3])},
    "backwards": {"starts": numpy.array([0, 2, 1, 3, 4])},
    "a bomb": {"pieces": numpy.zeros((1 << 26) + 1, dtype=numpy.int8)},
    "two dimensions": {"pieces": numpy.zeros((2, 2), dtype=numpy.int64)},
}


@pytest.mark.parametrize("case", MAPS)
def test_maps(tmp_path, case):
    from megatron_prune.errors import InputError
    from megatron_prune.vocabulary.id_map import load_map

    assert len(load_map(archive(tmp_path / "good.npz")).pieces) == 4
    with pytest.raises(InputError, match="x.npz is no map of a trimmed vocabulary"):
        load_map(archive(tmp_path / "x.npz", **MAPS[case]))
