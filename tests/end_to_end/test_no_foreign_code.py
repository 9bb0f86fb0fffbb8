"""Nothing that a Hugging Face directory brings is run, and nobody is asked whether it may be."""

from __future__ import annotations

import ast
import builtins
from pathlib import Path

import pytest
import torch
from foreign import as_bin, edit, run
from tiny import logits
from transformers import AutoTokenizer

import megatron_prune
from megatron_prune.errors import CheckpointError, InputError
from megatron_prune.runtime.stock_model import load_stock_model
from megatron_prune.text.encoder import load_tokenizer

TOKENS = torch.randint(0, 307, (1, 20), generator=torch.Generator().manual_seed(2))


EVIL = """open({marker!r}, "w").close()
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast
class T(PreTrainedTokenizerFast): pass
class M(LlamaForCausalLM): pass
"""


@pytest.fixture
def evil(model, tmp_path, monkeypatch):
    """A model whose directory brings code; whoever asks on standard input is answered yes, and the question is a fault."""
    folder = model()
    (folder / "evil.py").write_text(EVIL.format(marker=str(tmp_path / "executed")))

    def answer(prompt=""):
        (tmp_path / "asked").write_text(prompt)
        return "y"

    monkeypatch.setattr(builtins, "input", answer)
    yield folder
    assert not (tmp_path / "executed").exists() and not (tmp_path / "asked").exists()


@pytest.mark.parametrize("name", ["EvilTokenizer", "PreTrainedTokenizerFast"])
@pytest.mark.parametrize("file", ["tokenizer_config.json", "config.json"])
def test_a_tokenizer_that_wants_its_own_code_is_refused_and_nobody_is_asked(evil, tmp_path, capsys, name, file):
    edit(evil / "tokenizer_config.json", tokenizer_class=name)
    edit(evil / file, auto_map={"AutoTokenizer": ["evil.T", "evil.T"]})
    with pytest.raises(InputError, match="(?s)code of its own, which is never run.*evil.T"):
        load_tokenizer(evil)
    (tmp_path / "text.txt").write_text("some text")
    argv = ["preprocess", "--input", str(tmp_path / "text.txt"), "--tokenizer", str(evil), "--output-prefix", str(tmp_path / "x")]
    assert run(*argv) == 2
    said = capsys.readouterr().err
    assert "code of its own" in said and "trust_remote_code" not in said


def test_a_model_that_wants_its_own_code_is_refused_by_every_verb(evil, tmp_path, capsys):
    edit(evil / "config.json", auto_map={"AutoModelForCausalLM": "evil.M", "AutoConfig": "evil.C"})
    for argv in (
        ["convert", "--load-dir", str(evil), "--save-dir", str(tmp_path / "m")],
        ["prune-hf", "--model_name_or_path", str(evil), "--output_path", str(tmp_path / "m"), "--ffn_hidden_size_remain", "60"],
        ["compare", "--before", str(evil), "--after", str(evil)],
        ["inspect", str(evil)],
        ["estimate", str(evil)],
    ):
        assert run(*argv) == 2
        said = capsys.readouterr().err
        assert "code of its own" in said and "trust_remote_code" not in said
    with pytest.raises(CheckpointError, match="code of its own"):
        load_stock_model(evil)


SAFE_LOADS = {"from_pretrained", "from_config", "load_dataset", "load_dataset_builder"}


def test_every_call_that_could_load_foreign_code_says_that_it_must_not():
    root = Path(megatron_prune.__file__).parents[1]
    files = [
        file
        for part in ("megatron_prune", "emb_pruner", "prune_hf", "scripts", "benchmarks", "tools")
        for file in (root / part).rglob("*.py")
    ]
    seen, wrong = 0, []
    for file in files:
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if not isinstance(node, ast.Call):
                continue
            named = [node.func, *node.args]  # also handed on to be called
            if any(isinstance(item, ast.Attribute) and item.attr in SAFE_LOADS for item in named):
                seen += 1
                safe = any(key.arg == "trust_remote_code" and getattr(key.value, "value", None) is False for key in node.keywords)
                spread = any(
                    key.arg is None and isinstance(key.value, ast.Name) and key.value.id == "safe" for key in node.keywords
                )
                if not (safe or spread):
                    wrong.append(f"{file.relative_to(root)}:{node.lineno}")
    assert not wrong and seen >= 8


def test_no_pickle_of_a_model_reaches_transformers(model, tmp_path, tiny, monkeypatch):
    folder = as_bin(model("qwen2"))
    monkeypatch.setattr(torch, "load", lambda *_, **__: pytest.fail("torch.load"))
    with torch.no_grad():
        assert torch.equal(load_stock_model(folder, dtype=torch.float32)(TOKENS).logits, logits(tiny("qwen2"), TOKENS))
    argv = [
        "prune-hf",
        "--model_name_or_path",
        str(folder),
        "--output_path",
        str(tmp_path / "cut"),
        "--ffn_hidden_size_remain",
        "60",
    ]
    assert run(*argv, "--nsamples", "2", "--seq_length", "16", "--reconstruct", "0") == 0
    assert (tmp_path / "cut/model.safetensors").is_file()


def test_a_tied_bin_is_loaded_tied(model, tiny):
    folder = as_bin(model(tie_word_embeddings=True))
    found = load_stock_model(folder)
    assert found.lm_head.weight is found.model.embed_tokens.weight and found.dtype == torch.bfloat16


def test_what_transformers_cannot_load_is_one_message(model):
    folder = model(config={"id2label": {"x": "y"}})
    with pytest.raises(InputError, match="transformers cannot load the model"):
        load_stock_model(folder)


def test_a_tokenizer_that_names_more_tokens_than_the_model_has_is_refused(model, tmp_path, capsys):
    folder = model()
    assert run("convert", "--load-dir", folder, "--save-dir", tmp_path / "m") == 0
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.add_tokens(["The", "quick", "brown", "fox", *map(str, range(40))])
    tokenizer.save_pretrained(folder)
    assert run("verify", "--load-dir", tmp_path / "m", "--hf-dir", folder) == 2
    assert "names tokens that the model has no row for" in capsys.readouterr().err
