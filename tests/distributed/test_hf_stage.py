"""The route without Megatron: transformers' layers give what megatron-core's give, and so do the scores and fits on top."""

from __future__ import annotations

import functools
import json
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import rank_jobs
import rank_jobs_stage
import torch
from rank_jobs_stage import EVERYTHING, values_inside
from safetensors.torch import load_file, save_file
from tiny import FAMILIES, logits, state_dict

from megatron_prune.checkpoint import huggingface
from megatron_prune.errors import InputError
from megatron_prune.importance.collect import collect
from megatron_prune.importance.statistics import LayerStatistics, Statistics
from megatron_prune.importance.walk import layer_reader
from megatron_prune.planning.plan import load_plan
from megatron_prune.pruning.options import BEST
from megatron_prune.runtime.huggingface_stage import HuggingFaceStage, able_family
from megatron_prune.runtime.stage import reader
from megatron_prune.runtime.world import World
from megatron_prune.steps.convert import ConvertOptions, convert
from megatron_prune.steps.export import ExportOptions, export
from megatron_prune.steps.prune_hf import PruneHfOptions, prune_hf
from megatron_prune.text.tokens import Calibration

LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 500.0,
    "factor": 4.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}
VARIANTS = [
    *[(family, {}) for family in FAMILIES],
    ("llama", {"rope_parameters": LLAMA3}),
    ("qwen3", {"rope_parameters": {"rope_type": "linear", "factor": 3.0, "rope_theta": 700.0}}),
    ("mistral", {"sliding_window": 5}),
    ("mistral", {"sliding_window": 24, "hidden_size": 40}),
]
LONG = 24


def relative(found: torch.Tensor, wanted: torch.Tensor) -> float:
    """Largest difference as a share of the largest value."""
    return ((found - wanted).abs().max() / wanted.abs().max().clamp(min=1e-30)).item()


# --------------------------------------------------------------------------------------------------------------- the layer


@pytest.mark.parametrize("family, changes", VARIANTS)
@pytest.mark.parametrize("tp", [1, 2])
def test_every_function_of_a_layer_is_that_of_megatron_core(tiny, ranks, family, changes, tp):
    folder = tiny(family, dtype="float32", **changes)
    model = huggingface.open_model(folder)
    stream = torch.randn(3, LONG, model.config.hidden_size, generator=torch.Generator().manual_seed(4))
    wanted = ranks(tp).run(rank_jobs_stage.megatron_values, str(folder), 2, stream.numpy(), tp, "float32")
    stage = HuggingFaceStage(model.family, dtype=torch.float32, seq_length=LONG + 3)
    layer = stage.layer(model.config.of_layer(2))
    layer.load(layer_reader(model.tensors, 2))
    found = values_inside(layer, stream.to(stage.device), stage)
    assert found.keys() == wanted[0].keys() and len(found) == 8
    for name, value in found.items():
        for rank in wanted:
            assert relative(value.cpu(), torch.from_numpy(rank[name])) < 1e-5, name


@pytest.mark.parametrize("family", FAMILIES)
def test_a_layer_in_bf16(tiny, ranks, family):
    folder = tiny(family, dtype="float32")
    model = huggingface.open_model(folder)
    stream = torch.randn(2, LONG, 48, generator=torch.Generator().manual_seed(5))
    wanted = ranks(1).run(rank_jobs_stage.megatron_values, str(folder), 0, stream.numpy(), 1, "bfloat16")[0]
    stage = HuggingFaceStage(model.family, dtype=torch.bfloat16, seq_length=LONG)
    layer = stage.layer(model.config.of_layer(0))
    layer.load(layer_reader(model.tensors, 0))
    for name, value in values_inside(layer, stream.to(stage.device, torch.bfloat16), stage).items():
        assert value.dtype is torch.bfloat16 and relative(value.float().cpu(), torch.from_numpy(wanted[name])) < 0.03, name


@pytest.mark.parametrize("family, changes", VARIANTS)
def test_layers_one_after_another_are_the_model(tiny, family, changes):
    from transformers import AutoModelForCausalLM

    folder = tiny(family, dtype="float32", **changes)
    model = huggingface.open_model(folder)
    tokens = torch.arange(2 * LONG).view(2, LONG) * 5 % 307
    with torch.no_grad():
        whole = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()(tokens, output_hidden_states=True)
    stage = HuggingFaceStage(model.family, dtype=torch.float32, seq_length=LONG)
    for number in range(3):  # the last of hidden_states is normalised
        layer = stage.layer(model.config.of_layer(number))
        layer.load(layer_reader(model.tensors, number))
        values = values_inside(layer, whole.hidden_states[number].to(stage.device), stage)
        after = whole.hidden_states[number] + values["attention"].cpu() + values["mlp"].cpu()
        assert relative(after, whole.hidden_states[number + 1]) < 1e-5


def test_some_roles_are_loaded_and_the_others_stay(tiny):
    model = huggingface.open_model(tiny("qwen2", dtype="float32"))
    stage = HuggingFaceStage(model.family, dtype=torch.float32, seq_length=8)
    layer = stage.layer(model.config)
    layer.load(layer_reader(model.tensors, 0))
    stream = torch.randn(1, 8, 48).to(stage.device)
    before = values_inside(layer, stream, stage)
    layer.load(reader({"o": torch.zeros(48, 96)}), {"o"})
    after = values_inside(layer, stream, stage)
    assert torch.equal(before["context"], after["context"]) and not after["write_attention"].any()
    layer.load(layer_reader(model.tensors, 0), {"o", "down"})
    assert all(torch.equal(value, before[name]) for name, value in values_inside(layer, stream, stage).items())


def test_a_shape_that_the_familys_class_refuses_is_run_by_one_of_its_kin(tiny):
    model = huggingface.open_model(tiny("llama", dtype="float32"))
    narrow = replace(model.config, hidden_size=36, num_attention_heads=9, num_query_groups=9)
    assert able_family(model.family, narrow).name == "llama"
    odd = replace(narrow, hidden_size=40)
    assert able_family(model.family, odd).name == "mistral"
    stage = HuggingFaceStage(model.family, dtype=torch.float32, seq_length=8)
    layer = stage.layer(odd)
    sizes = {"input_norm": (40,), "q": (72, 40), "k": (72, 40), "v": (72, 40), "o": (40, 72), "post_norm": (40,)}
    sizes |= {"gate": (96, 40), "up": (96, 40), "down": (40, 96)}
    layer.load(reader({role: torch.ones(size) for role, size in sizes.items()}))
    assert values_inside(layer, torch.ones(1, 4, 40).to(stage.device), stage)["write_mlp"].isfinite().all()
    with pytest.raises(InputError, match="cannot express"):
        stage.layer(replace(model.config, qk_norm=True, qkv_bias=True))  # no family has both


# ------------------------------------------------------------------------------------------------------------ statistics


@pytest.mark.parametrize("family, tp", [("gemma3_text", 2), ("llama", 1), ("mistral", 3), ("qwen2", 3), ("qwen3", 2)])
def test_statistics_are_those_of_megatron(tiny, ranks, tmp_path, family, tp):
    folder = tiny(family, dtype="float32")
    model = huggingface.open_model(folder)
    generator = torch.Generator().manual_seed(6)
    lengths = torch.tensor([LONG, 7, LONG, 15, LONG])
    tokens = torch.randint(0, 307, (5, LONG), generator=generator) * (torch.arange(LONG) < lengths[:, None])
    text = {"tokens": tokens, "lengths": lengths, "weights": torch.tensor([0.5, 2.0, 1.0, 1.0, 3.0], dtype=torch.float64)}
    for name in ("megatron", "hf"):
        (tmp_path / name).mkdir()
    arrays = {key: value.numpy() for key, value in text.items()}
    ranks(tp).run(rank_jobs_stage.megatron_collect, str(folder), str(tmp_path / "megatron"), arrays, tp)
    stage = HuggingFaceStage(model.family, dtype=torch.float32, seq_length=LONG)
    found = Statistics(folder=tmp_path / "hf", config=model.config)
    collect(model.tensors, Calibration(**text), stage, found, EVERYTHING, World())
    for part in (*range(4), None):
        ours = LayerStatistics.load(found.path(part))
        theirs = LayerStatistics.load(Statistics(folder=tmp_path / "megatron", config=model.config).path(part))
        assert ours.sites.keys() == theirs.sites.keys()
        assert abs(ours.similarity - theirs.similarity) < 1e-5
        assert relative(ours.last, theirs.last) < 1e-5 and relative(ours.stream, theirs.stream) < 1e-5
        for name, site in ours.sites.items():
            other = theirs.sites[name]
            assert site.tokens == pytest.approx(other.tokens, rel=1e-12)
            for field in ("total", "squares", "sample_means", "moment"):
                assert relative(getattr(site, field), getattr(other, field)) < 1e-5, (part, name, field)


# ---------------------------------------------------------------------------------------------------------- pruned models


@pytest.fixture(scope="module")
def text(tmp_path_factory) -> Path:
    """Enough words for a few dozen samples, no two lines alike."""
    path = tmp_path_factory.mktemp("text") / "words.txt"
    path.write_text("\n\n".join(f"Line {n} of {n * n % 97}: the {n % 7} boxes and {n * 31 % 89} models." for n in range(400)))
    return path


@pytest.fixture(scope="module")
def megatron(tiny, tmp_path_factory):
    """``megatron(family, **changes)`` → (Hugging Face directory in fp32, Megatron checkpoint of it)."""
    made = {}

    def get(family: str, **changes) -> tuple[Path, Path]:
        key = (family, *sorted(changes.items()))
        if key not in made:
            home = tmp_path_factory.mktemp("megatron")
            source, target = home / "source", home / "checkpoint"
            shutil.copytree(tiny(family, dtype="float32", **changes), source)
            even_final_norm(source)
            convert(ConvertOptions(load=str(source), save=str(target)), World())
            made[key] = source, target
        return made[key]

    return get


def even_final_norm(folder: Path) -> None:
    """Make the final norm vary as little as that of a real model that can be rotated with its head tied."""
    tensors = load_file(folder / "model.safetensors")
    tensors["model.norm.weight"] = 1.0 + 0.2 * (tensors["model.norm.weight"] - 1.0)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def by_hf(source: Path, save: Path, **options) -> Path:
    prune_hf(PruneHfOptions(load=str(source), save=str(save), **options), World())
    return save


FIT = {"nsamples": 24, "seq_length": 48, "ridge": 0.03, "reader_ridge": 0.03}
# in sequence a block starts from what rounding made of the ones before, and Adam's steps do not forget it: least squares alone there
CUTS = {
    "ffn": ("qwen2", {}, {"ffn_hidden_size_remain": 60}),
    "heads": ("qwen2", {}, {"num_attention_heads_remain": 6, "num_query_groups_remain": 6}),
    "kv groups": ("qwen3", {}, {"num_query_groups_remain": 3}),
    "hidden rotate, untied": ("mistral", {}, {"hidden_size_remain": 36}),
    "hidden rotate, tied": ("llama", {"tie_word_embeddings": True}, {"hidden_size_remain": 36}),
    "hidden rotate, head untied": ("llama", {"tie_word_embeddings": True}, {"hidden_size_remain": 36, "untie": True}),
    "hidden select, tied": ("qwen3", {"tie_word_embeddings": True}, {"hidden_size_remain": 36, "hidden_method": "select"}),
    "hidden select, untied": ("qwen2", {}, {"hidden_size_remain": 30, "hidden_method": "select"}),
    "layers": ("qwen2", {}, {"drop_layers": (1, 2)}),
    "norms after blocks: ffn and layers": ("gemma3_text", {}, {"ffn_hidden_size_remain": 60, "drop_layers": (1,)}),
    "norms after blocks: hidden and groups": ("gemma3_text", {}, {"hidden_size_remain": 36, "num_query_groups_remain": 3}),
    "the first and the last layer": ("mistral", {"sliding_window": 5}, {"drop_layers": (0, 3)}),
    "sequential": ("qwen2", {}, {"ffn_hidden_size_remain": 60, "hidden_size_remain": 36, "sequential": True, "reconstruct": 0}),
    "a class of its kin": ("llama", {}, {"hidden_size_remain": 40, "target_family": "mistral", "ffn_hidden_size_remain": 48}),
}


@pytest.fixture(scope="module")
def by_hf_alone(megatron, text, tmp_path_factory):
    """``by_hf_alone(cut)`` → (what ``prune_hf`` makes of it, its plan), once."""

    def make(cut: str) -> tuple[Path, Path]:
        family, changes, asked = CUTS[cut]
        home = tmp_path_factory.mktemp("cut")
        plan = home / "plan.json"
        options = {**FIT, **asked, "data": (f"{text}:1",), "save_plan": str(plan)}
        return by_hf(megatron(family, **changes)[0], home / "hf", **options), plan

    return functools.cache(make)


@pytest.mark.parametrize("tp", [1, 3])
@pytest.mark.parametrize("cut", CUTS)
def test_a_refitted_model_is_that_of_the_megatron_route(megatron, by_hf_alone, ranks, text, tmp_path, cut, tp):
    family, changes, asked = CUTS[cut]
    _, checkpoint = megatron(family, **changes)
    ours, plan = by_hf_alone(cut)
    recorded = load_plan(plan)
    assert recorded.rotated == ("rotate" in cut or "class" in cut or "sequential" in cut) and recorded.made_by["refit"]
    options = {"load": str(checkpoint), "save": str(tmp_path / "cut"), "plan": str(plan), "tensor_model_parallel_size": tp}
    options |= {**FIT, "data": (f"{text}:1",)}
    options |= {key: asked[key] for key in ("sequential", "reconstruct", "target_family") if key in asked}
    ranks(tp).run(rank_jobs.run_steps, ("prune", options))
    theirs = tmp_path / "exported"
    aim = {"target_family": asked["target_family"]} if "target_family" in asked else {}
    export(ExportOptions(load=str(tmp_path / "cut"), save=str(theirs), **aim), World())
    assert (ours / "config.json").read_text() == (theirs / "config.json").read_text()
    left, right = state_dict(ours), state_dict(theirs)
    assert left.keys() == right.keys()
    for name in left:
        assert (left[name] - right[name]).norm() < 5e-5 * right[name].norm(), name
        # Adam moves an element whose gradient is nothing but rounding as far as any other
        assert relative(left[name], right[name]) < 5e-4, name
    found = logits(ours, torch.arange(40)[None])
    assert found.isfinite().all() and relative(found, logits(theirs, torch.arange(40)[None])) < 1e-3


def test_without_a_plan_both_routes_choose_the_same(megatron, ranks, text, tmp_path):
    source, checkpoint = megatron("qwen2")
    asked = {"data": (f"{text}:1",), "nsamples": 16, "seq_length": 48, "ffn_hidden_size_remain": 60, "num_layers_remain": 3}
    asked |= {"num_query_groups_remain": 3, "hidden_size_remain": 36, "hidden_method": "select"}
    by_hf(source, tmp_path / "hf", **asked, save_plan=str(tmp_path / "hf.json"))
    options = {"load": str(checkpoint), "save": str(tmp_path / "cut"), "save_plan": str(tmp_path / "cut.json"), **asked}
    ranks(1).run(rank_jobs.run_steps, ("prune", options))
    assert json.loads((tmp_path / "hf.json").read_text()) == json.loads((tmp_path / "cut.json").read_text())
    assert load_plan(tmp_path / "hf.json").made_by["metric"] == {
        axis: BEST[axis] for axis in ("ffn", "hidden", "kv_head", "layer")
    }


def test_refitting_helps(tiny, text, tmp_path):
    from transformers import AutoTokenizer

    source = tiny("qwen2", dtype="float32")
    asked = {"ffn_hidden_size_remain": 48, "metric": "random"}
    by_hf(source, tmp_path / "fitted", **asked, data=(f"{text}:1",), nsamples=48, seq_length=48)
    by_hf(source, tmp_path / "cut", **asked)
    other = "Line 7 of 12345: many models, 88 boxes and the 3 lines of 50. " * 2
    tokens = AutoTokenizer.from_pretrained(source)(other, return_tensors="pt").input_ids[:, :60]
    dense = logits(source, tokens)
    error = lambda name: (logits(tmp_path / name, tokens) - dense).square().mean()
    assert error("fitted") < 0.8 * error("cut")


def test_a_run_without_data_measures_on_the_models_own_samples_and_imports_no_megatron(tiny, tmp_path):
    """``megatron`` cannot even be imported in that process."""
    words = ["--model_name_or_path", tiny("mistral"), "--output_path", tmp_path / "out", "--hidden_size_remain", "36"]
    words += ["--ffn-hidden-size-remain", "60", "--nsamples", "8", "--seq-length", "24"]
    code = (
        "import sys; sys.modules['megatron'] = None\n"
        "from megatron_prune.cli.main import run_verb\n"
        f"run_verb('prune-hf', {[str(word) for word in words]!r}, prog='prune_hf')\n"
        "assert not [name for name in sys.modules if name.startswith('megatron.')]\n"
    )
    done = subprocess.run([sys.executable, "-c", code], check=False, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    made_by = json.loads((tmp_path / "out/plan.json").read_text())["made_by"]
    assert [entry["name"] for entry in made_by["calibration"]["sources"]] == ["self"] and made_by["refit"]
    assert logits(tmp_path / "out", torch.arange(20)[None]).isfinite().all()
    assert [entry.name for entry in tmp_path.iterdir()] == ["out"]


# ------------------------------------------------------------------------------------------------------------- bad input


@pytest.mark.parametrize(
    "options, message",
    [
        ({"hidden_size_remain": 36, "prune_config_path": "sizes.json"}, "hidden-size-remain and --prune-config-path"),
        ({"params": "50K", "prune_config_path": "sizes.json"}, "params and --prune-config-path"),
        ({"plan": "plan.json", "prune_config_path": "sizes.json"}, "plan and --prune-config-path"),
        ({"ffn_hidden_size_remain": 48, "metric": "taylor"}, "taylor needs gradients of the weights.*convert"),
        ({"num_layers_remain": 2, "depth_metric": "perplexity"}, "perplexity needs losses of the whole model"),
        ({"hidden_size_remain": 36, "params": "50K"}, "budget"),
        ({"prune_config_path": "none.json"}, "none.json.*give sizes"),
        ({"hidden_size_remain": 36, "metric": "random", "hidden_method": "rotate"}, "needs text"),
    ],
)
def test_what_cannot_be_is_refused_before_the_work(tiny, tmp_path, options, message):
    with pytest.raises(InputError, match=f"(?s){message}"):
        by_hf(tiny("mistral"), tmp_path / "out", **options)
    assert not list(tmp_path.iterdir())
