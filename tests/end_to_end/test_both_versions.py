"""What is written of a changed model means the same to transformers 4 and 5."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import time
from pathlib import Path

import pytest
import torch
from foreign import run, there_and_back
from tiny import logits
from transformers import AutoTokenizer, LlamaTokenizer, PreTrainedTokenizerFast

from megatron_prune.checkpoint import huggingface
from megatron_prune.checkpoint.both_versions import rewrite_side_files
from megatron_prune.writing import huggingface as written

TOKENS = torch.randint(0, 307, (1, 20), generator=torch.Generator().manual_seed(2))


ROPES = {
    "default": ({"rope_type": "default", "rope_theta": 5e5}, None),
    "linear": (
        {"rope_type": "linear", "rope_theta": 7e4, "factor": 4.0},
        {"rope_type": "linear", "type": "linear", "factor": 4.0},
    ),
    "llama3": (
        {"rope_type": "llama3", "rope_theta": 5e5, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
        | {"original_max_position_embeddings": 32},
        {"rope_type": "llama3", "type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
        | {"original_max_position_embeddings": 32},
    ),
}


TEXT = "A small text for a small tokenizer."


def with_more_tokens(folder: Path) -> None:
    """A tokenizer as transformers 5 saves one with further special tokens."""
    special = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "</s>", "additional_special_tokens": ["jag"]}
    tokenizer = PreTrainedTokenizerFast(tokenizer_file=str(folder / "tokenizer.json"), **special)
    tokenizer.save_pretrained(folder)


LOCAL = {"rope_type": "default", "rope_theta": 30.0}


def rope_parameters(family: str, rope: str) -> dict:
    """As transformers 5 writes them; Gemma 3 has such an entry for either kind of layer."""
    new = ROPES[rope][0]
    return {"full_attention": new, "sliding_attention": LOCAL} if family == "gemma3_text" else new


def check_both(folder: Path, family: str, rope: str) -> None:
    """What transformers 4 reads of a directory, with what transformers 5 reads beside."""
    config, tokenizer = (json.loads((folder / name).read_text()) for name in ("config.json", "tokenizer_config.json"))
    new, old = ROPES[rope]
    assert config["rope_theta"] == new["rope_theta"] and config["rope_scaling"] == old
    assert config["rope_parameters"] == rope_parameters(family, rope)
    if family == "gemma3_text":
        assert config["rope_local_base_freq"] == 30.0 and len(config["layer_types"]) == config["num_hidden_layers"]
    assert config["torch_dtype"] == config["dtype"]
    assert tokenizer["tokenizer_class"] == "PreTrainedTokenizerFast"
    assert tokenizer["additional_special_tokens"] == ["jag"] and "extra_special_tokens" not in tokenizer
    again = AutoTokenizer.from_pretrained(folder)
    assert again.decode(again(TEXT)["input_ids"]) == TEXT and "jag" in again.all_special_tokens


@pytest.fixture
def newest(tiny, tmp_path):
    """A model as transformers 5 saves it: none of its keys of rotary positions, dtype and tokenizer is known to transformers 4."""

    def make(family="llama", rope="default") -> Path:
        folder = tmp_path / "hf"
        shutil.copytree(tiny(family, rope_parameters=rope_parameters(family, rope)), folder)
        with_more_tokens(folder)
        config, tokenizer = (json.loads((folder / name).read_text()) for name in ("config.json", "tokenizer_config.json"))
        assert "rope_theta" not in config and "torch_dtype" not in config and tokenizer["tokenizer_class"] == "TokenizersBackend"
        return folder

    return make


@pytest.mark.parametrize(
    "family, rope",
    [("gemma3_text", "linear"), ("llama", "llama3"), ("mistral", "default"), ("qwen2", "linear"), ("qwen3", "llama3")],
    ids=str,
)
def test_every_way_to_a_changed_model_says_what_transformers_4_reads(newest, family, tmp_path, rope):
    source = newest(family, rope)
    assert run("convert", "--load-dir", source, "--save-dir", tmp_path / "m") == 0
    cut = ("--ffn_hidden_size_remain", 60, "--metric", "magnitude")
    assert run("prune", "--load", tmp_path / "m", "--save", tmp_path / "cut", *cut, "--drop_layers", 1) == 0
    assert run("export", "--load-dir", tmp_path / "cut", "--save-dir", tmp_path / "a") == 0
    assert run("prune-hf", "--model_name_or_path", source, "--output_path", tmp_path / "b", *cut) == 0
    assert run("vocab", "trim", "--load-dir", source, "--save-dir", tmp_path / "c", "--remain-vocab-size", 306) == 0
    assert run("export", "--load-dir", tmp_path / "m", "--save-dir", tmp_path / "d", "--target-params-dtype", "fp32") == 0
    for name in "abcd":
        check_both(tmp_path / name, family, rope)
    assert json.loads((tmp_path / "d/config.json").read_text())["torch_dtype"] == "float32"
    there_and_back(source, tmp_path / "unchanged")


def test_ids_without_a_row_are_left_out_of_what_a_changed_model_says(model, tmp_path, capsys):
    folder = model(config={"bos_token_id": 307, "eos_token_id": [1, 400], "sep_token_id": 5})
    (folder / "generation_config.json").write_text(json.dumps({"pad_token_id": 999, "eos_token_id": [1, 400], "top_k": 7}))
    argv = ["prune-hf", "--model_name_or_path", folder, "--output_path", tmp_path / "cut"]
    assert run(*argv, "--ffn_hidden_size_remain", 60, "--metric", "magnitude") == 0
    assert "bos_token_id 307 names no row of the vocabulary and is left out" in capsys.readouterr().err
    config, generation = (json.loads((tmp_path / "cut" / name).read_text()) for name in ("config.json", "generation_config.json"))
    assert (config["bos_token_id"], config["eos_token_id"], config["sep_token_id"]) == (None, [1], 5)
    assert generation == {"pad_token_id": None, "eos_token_id": [1], "top_k": 7}
    there_and_back(folder, tmp_path)


OLD = os.environ.get("TRANSFORMERS_4_PYTHON")
"""A Python with transformers 4."""

_LOGITS = """
import sys, torch
from transformers import AutoModelForCausalLM, AutoTokenizer
tokens = torch.load(sys.argv[1])
found = {}
for folder in sys.argv[3:]:
    AutoTokenizer.from_pretrained(folder)
    with torch.no_grad():
        found[folder] = AutoModelForCausalLM.from_pretrained(folder, torch_dtype=torch.float32)(tokens).logits
torch.save(found, sys.argv[2])
"""


@pytest.mark.slow
@pytest.mark.skipif(OLD is None, reason="TRANSFORMERS_4_PYTHON names no Python with transformers 4")
@pytest.mark.parametrize("rope", ROPES)
def test_transformers_4_computes_what_transformers_5_computes(newest, family, tmp_path, rope):
    source = newest(family, rope)
    argv = ["prune-hf", "--model_name_or_path", str(source), "--output_path", str(tmp_path / "cut")]
    assert run(*argv, "--ffn_hidden_size_remain", "60", "--metric", "magnitude") == 0
    torch.save(TOKENS, tmp_path / "tokens")
    command = [OLD, "-c", _LOGITS, str(tmp_path / "tokens"), str(tmp_path / "found"), str(tmp_path / "cut")]
    subprocess.run(command, check=True, env={key: value for key, value in os.environ.items() if key != "PYTHONPATH"})
    found = torch.load(tmp_path / "found")[str(tmp_path / "cut")]
    assert torch.equal(found, logits(tmp_path / "cut", TOKENS))


@pytest.mark.parametrize("begins, ends", [(True, False), (False, False), (False, True)])
def test_llamas_tokenizer_says_where_a_text_begins_and_ends_since_its_class_in_transformers_4_has_its_own_mind(
    tmp_path, begins, ends
):
    vocabulary = {"<unk>": 0, "<s>": 1, "</s>": 2, **{f"<0x{byte:02X}>": 3 + byte for byte in range(256)}, "▁": 259, "a": 260}
    LlamaTokenizer(vocab=vocabulary, merges=[], add_bos_token=begins, add_eos_token=ends).save_pretrained(tmp_path)
    assert "add_bos_token" not in json.loads((tmp_path / "tokenizer_config.json").read_text())
    before = AutoTokenizer.from_pretrained(tmp_path)("a a")["input_ids"]
    rewrite_side_files(tmp_path)
    found = json.loads((tmp_path / "tokenizer_config.json").read_text())
    assert (found["add_bos_token"], found["add_eos_token"]) == (begins, ends)
    assert AutoTokenizer.from_pretrained(tmp_path)("a a")["input_ids"] == before
    assert (before[0] == 1, before[-1] == 2) == (begins, ends)


def test_nothing_else_looks_at_transformers_while_a_thread_imports_it(model, tmp_path, monkeypatch):
    """Python gives half a module to who imports it while another thread does: an export of a small model then failed its check."""
    seen = []

    def slow(family: str) -> None:
        seen.append("begun")
        time.sleep(0.2)
        seen.append("imported")

    monkeypatch.setattr(written, "import_stock_class", slow)
    monkeypatch.setattr(written, "check_huggingface", lambda *_: seen.append("checked"))
    monkeypatch.setattr(
        huggingface, "open_model", lambda path, really=huggingface.open_model: (seen.append("opened"), really(path))[1]
    )
    argv = ["prune-hf", "--model_name_or_path", model(), "--output_path", tmp_path / "cut"]
    assert run(*argv, "--ffn_hidden_size_remain", 60, "--metric", "magnitude") == 0
    assert seen[-4:] == ["opened", "begun", "imported", "checked"]
