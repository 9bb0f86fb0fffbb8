"""A pruned model's exported folder is one that stock transformers loads, tokenizes with and generates from."""

from __future__ import annotations

import json

import pytest
import rank_jobs
import tiny as tiny_module
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from megatron_prune.errors import InputError
from megatron_prune.runtime.world import World
from megatron_prune.steps.convert import ConvertOptions, convert
from megatron_prune.steps.export import ExportOptions, export
from megatron_prune.steps.prune import PruneOptions, prune

TOKENS = torch.randint(0, 307, (1, 20), generator=torch.Generator().manual_seed(2))
SIZES = {
    "hidden_size_remain": 36,
    "ffn_hidden_size_remain": 60,
    "num_attention_heads_remain": 6,
    "num_query_groups_remain": 6,
    "drop_layers": (1,),
    "metric": "magnitude",
}
ARCHITECTURES = {
    "gemma3_text": "Gemma3ForCausalLM",
    "llama": "LlamaForCausalLM",
    "mistral": "MistralForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
}


def pruned(source, home, **options):
    convert(ConvertOptions(load=str(source), save=str(home / "m")), World())
    prune(PruneOptions(load=str(home / "m"), save=str(home / "cut"), **options), World())
    return home / "cut"


@pytest.mark.parametrize("tied", [True, False])
def test_a_pruned_model_of_every_family_loads_generates_and_has_the_logits_of_the_megatron_model(
    tiny, ranks, family, tmp_path, tied
):
    source = tiny(family, tie_word_embeddings=tied)
    cut = pruned(source, tmp_path, **SIZES)
    export(ExportOptions(load=str(cut), save=str(tmp_path / "hf")), World())
    model, loading = AutoModelForCausalLM.from_pretrained(tmp_path / "hf", dtype=torch.float32, output_loading_info=True)
    assert not any(loading[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert type(model).__name__ == ARCHITECTURES[family]
    shape = ("hidden_size", "intermediate_size", "num_attention_heads", "num_key_value_heads", "num_hidden_layers", "head_dim")
    assert [getattr(model.config, name) for name in shape] == [36, 60, 6, 6, 3, 8]
    assert model.config.tie_word_embeddings is tied
    assert json.loads((tmp_path / "hf/config.json").read_text())["dtype"] == "bfloat16"

    before, after = (AutoTokenizer.from_pretrained(folder) for folder in (source, tmp_path / "hf"))
    prompt = after(tiny_module.TEXT, return_tensors="pt", return_token_type_ids=False)
    assert prompt["input_ids"].tolist() == [before(tiny_module.TEXT)["input_ids"]]
    out = model.generate(**prompt, max_new_tokens=5, min_new_tokens=5, do_sample=False)
    assert out.shape[1] == prompt["input_ids"].shape[1] + 5
    assert isinstance(after.decode(out[0]), str)

    found = torch.from_numpy(ranks(3).run(rank_jobs.logits, str(cut), TOKENS.tolist(), 3, 1)[0])
    with torch.no_grad():
        expected = model.eval()(TOKENS).logits
    assert (found - expected).abs().max() < 1e-4 * expected.std()  # float32 sums in another order, as in test_logits.py


@pytest.mark.parametrize("family", ["gemma3_text", "qwen3"])
def test_lists_with_one_entry_per_layer_shrink_with_the_layers(tiny, tmp_path, family):
    source = tiny(family)
    assert len(json.loads((source / "config.json").read_text())["layer_types"]) == 4
    export(ExportOptions(load=str(pruned(source, tmp_path, **SIZES)), save=str(tmp_path / "hf")), World())
    config = json.loads((tmp_path / "hf/config.json").read_text())
    assert len(config["layer_types"]) == config["num_hidden_layers"] == 3


def test_a_hidden_size_that_llamas_class_cannot_say_is_refused_and_mistrals_class_says_it(tiny, ranks, tmp_path):
    source = tiny("llama", tie_word_embeddings=True)
    convert(ConvertOptions(load=str(source), save=str(tmp_path / "m")), World())
    options = {"load": str(tmp_path / "m"), "save": str(tmp_path / "cut"), "metric": "magnitude", "hidden_size_remain": 40}
    with pytest.raises(InputError, match=r"(?s)LlamaForCausalLM.*hidden_size 40 with 12.*36.*--target-family mistral"):
        prune(PruneOptions(**options), World())
    assert not (tmp_path / "cut").exists()

    prune(PruneOptions(**options, target_family="mistral"), World())
    export(ExportOptions(load=str(tmp_path / "cut"), save=str(tmp_path / "hf")), World())
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "hf", dtype=torch.float32).eval()
    assert (type(model).__name__, model.config.sliding_window) == ("MistralForCausalLM", None)
    assert (model.config.hidden_size, model.config.num_attention_heads, model.config.head_dim) == (40, 12, 8)
    found = torch.from_numpy(ranks(2).run(rank_jobs.logits, str(tmp_path / "cut"), TOKENS.tolist(), 2, 1)[0])
    with torch.no_grad():
        expected = model(TOKENS).logits
        assert model.generate(TOKENS, max_new_tokens=3, min_new_tokens=3, do_sample=False).shape == (1, 23)
    assert (found - expected).abs().max() < 1e-4 * expected.std()


def test_a_llama_is_exported_as_mistral_and_computes_the_same(tiny, tmp_path):
    source = tiny("llama", tie_word_embeddings=True)
    convert(ConvertOptions(load=str(source), save=str(tmp_path / "m")), World())
    export(ExportOptions(load=str(tmp_path / "m"), save=str(tmp_path / "hf"), target_family="mistral"), World())
    assert json.loads((tmp_path / "hf/config.json").read_text())["architectures"] == ["MistralForCausalLM"]
    assert torch.equal(tiny_module.logits(tmp_path / "hf", TOKENS), tiny_module.logits(source, TOKENS))


def test_a_family_of_another_architecture_is_refused(tiny, tmp_path):
    convert(ConvertOptions(load=str(tiny("qwen2")), save=str(tmp_path / "m")), World())
    with pytest.raises(InputError, match="(?s)--target-family mistral.*qwen2 model.*one of llama, qwen2, "):
        export(ExportOptions(load=str(tmp_path / "m"), save=str(tmp_path / "hf"), target_family="mistral"), World())
    assert not (tmp_path / "hf").exists()
