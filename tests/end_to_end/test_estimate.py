"""Estimates hold for what is measured, and `inspect` tells what a checkpoint is."""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import json
import re
import subprocess
import sys

import numpy
import pytest
import torch
from tiny import build_tiny, state_dict

from megatron_prune.arch.model import ModelConfig
from megatron_prune.arch.sharding import ParallelLayout
from megatron_prune.arch.tensors import parameter_count, tensor_ids, tensor_shape
from megatron_prune.checkpoint import huggingface
from megatron_prune.cli.main import main
from megatron_prune.families.family import FAMILIES
from megatron_prune.files.region import close_files
from megatron_prune.planning.needs import STEPS, Setup
from megatron_prune.planning.resources import (
    PROCESS_BYTES,
    RUNTIME_BYTES,
    Training,
    rank_parameters,
    saving_memory,
    streaming_memory,
)
from megatron_prune.runtime.world import World
from megatron_prune.steps.convert import ConvertOptions, convert
from megatron_prune.verbs.table import options_of

CHILD = """
import sys
from megatron_prune.cli.main import main
main(sys.argv[1:])
print(next(line.split()[1] for line in open("/proc/self/status") if line.startswith("VmHWM")))
"""


def peak(*arguments: str) -> int:
    done = subprocess.run([sys.executable, "-c", CHILD, *arguments], capture_output=True, text=True, check=True, timeout=240)
    return int(done.stdout.split()[-1]) * 1024


def test_memory_stays_within_the_estimate_and_does_not_grow_with_the_model(tmp_path):
    family, peaks = FAMILIES.get("llama"), {}
    for layers in (4, 12):
        config = ModelConfig(
            num_layers=layers,
            hidden_size=768,
            ffn_hidden_size=4096,
            num_attention_heads=12,
            num_query_groups=12,
            kv_channels=64,
            vocab_size=8000,
            tie_embeddings=False,
        )
        folder = tmp_path / str(layers)
        folder.mkdir()
        dtypes = {tensor: torch.bfloat16 for tensor in tensor_ids(config)}
        huggingface.lay_out(folder, config, family, family.hf_config(config, None), dtypes, max_shard_bytes=10**9)
        tensors = huggingface.open_model(folder).tensors
        for tensor in tensor_ids(config):
            tensors.tiles[tensor][0].region.write_from(torch.full(tensor_shape(tensor.role, config), 0.5).bfloat16())
        close_files()
        m = str(tmp_path / f"m{layers}")
        convert_peak = peak("convert", "--load-dir", str(folder), "--save-dir", m, "--target-tensor-parallel-size", "4")
        tp1 = ["--tensor-model-parallel-size", "1"]
        prune_peak = peak("prune", "--load", m, "--save", m + "p", "--ffn_hidden_size_remain", "3072", "--metric", "random", *tp1)
        assert convert_peak <= streaming_memory(config, 2) * 1.05
        assert prune_peak <= streaming_memory(config, 2, buffers=2) * 1.05
        assert convert_peak > 0.6 * PROCESS_BYTES
        peaks[layers] = (convert_peak, prune_peak)
    for small, large in zip(peaks[4], peaks[12]):
        assert large - small < 24e6  # the files grow by 190 MB


@pytest.mark.slow
def test_measuring_and_refitting_take_what_the_estimate_says(tmp_path, capsys):
    """Within a third: the C library keeps blocks below 32 MiB that were freed."""
    sizes = {"hidden_size": 768, "intermediate_size": 2560, "num_hidden_layers": 2, "max_position_embeddings": 128}
    build_tiny(tmp_path / "m", head_dim=64, vocab_size=32000, **sizes)
    dense = str(tmp_path / "dense")
    convert(ConvertOptions(load=str(tmp_path / "m"), save=dense), World())
    (tmp_path / "text.txt").write_text("".join(f"{number} boxers chase {number * 7}. " for number in range(4000)))
    asked, steps = ["--ffn-hidden-size-remain", "2048"], {}
    capsys.readouterr()
    for shape in (["--ratio", "0.05", "--allocate", "free"], asked):
        main(["estimate", dense, *shape, "--nsamples", "8", "--sample-length", "128", "--json"])
        steps |= json.loads(capsys.readouterr().out)["steps"]
    text = ["--nsamples", "8", "--seq-length", "128"]
    given = ["--data", f"{tmp_path / 'text.txt'}:1", *text]
    peaks = {
        "sampling text": peak("sample", "--load", dense, "--save", str(tmp_path / "own.safetensors"), *text),
        "scoring by gradients": peak("score", "--load", dense, "--save", str(tmp_path / "s"), "--metrics", "fisher", *given),
        "costs of blocks": peak(
            "score", "--load", dense, "--save", str(tmp_path / "c"), "--metrics", "random", "--costs", *given
        ),
        "re-fitting": peak(
            *("prune", "--load", dense, "--save", str(tmp_path / "p"), "--metric", "random", "--reconstruct", "1"), *asked, *given
        ),
    }
    for step, measured in peaks.items():
        assert 0.75 < measured / steps[step]["memory_per_rank"] < 1.34, (step, measured, steps[step])


@pytest.mark.slow
def test_refitting_takes_what_the_estimate_says_where_solving_is_most_of_it(tmp_path, capsys):
    """Second moments of many features, of which two halves, their sum and its factor are there together."""
    sizes = {"hidden_size": 192, "intermediate_size": 4608, "num_hidden_layers": 1, "max_position_embeddings": 128}
    build_tiny(tmp_path / "m", head_dim=16, vocab_size=512, dtype="float32", **sizes)
    (tmp_path / "text.txt").write_text("".join(f"{number} boxers chase {number * 7}. " for number in range(4000)))
    asked = ["--ffn-hidden-size-remain", "4096"]
    capsys.readouterr()
    main(["estimate", str(tmp_path / "m"), *asked, "--nsamples", "8", "--sample-length", "128", "--json"])
    expected = json.loads(capsys.readouterr().out)["steps"]["re-fitting"]["memory_per_rank"]
    given = ["--data", f"{tmp_path / 'text.txt'}:1", "--nsamples", "8", "--seq-length", "128", "--ridge", "1", "--no-sequential"]
    saved = ["--load", str(tmp_path / "m"), "--save", str(tmp_path / "p")]
    measured = peak("prune-hf", *saved, "--metric", "random", "--reconstruct", "0", *asked, *given)
    assert expected > RUNTIME_BYTES + 4 * 8 * 4096**2
    assert 0.75 < measured / expected < 1.34, (measured, expected)


COUNTER = """
import sys
from torch.utils.flop_counter import FlopCounterMode
from megatron_prune.cli.main import main
with FlopCounterMode(display=False) as counter:
    main(sys.argv[1:])
print(counter.get_total_flops())
"""


@pytest.fixture(scope="module")
def counting(tmp_path_factory):
    """A small model with a text: what runs on it do, as torch counts it, and what the estimate counts."""
    folder = tmp_path_factory.mktemp("counting")
    sizes = {"hidden_size": 192, "intermediate_size": 384, "num_hidden_layers": 2, "max_position_embeddings": 128}
    build_tiny(folder / "m", head_dim=16, vocab_size=512, **sizes)
    convert(ConvertOptions(load=str(folder / "m"), save=str(folder / "dense")), World())
    (folder / "text.txt").write_text("".join(f"{number} boxers chase {number * 7}. " for number in range(8000)))
    config = huggingface.open_model(folder / "m").config
    amount = ["--nsamples", "64", "--seq-length", "64"]

    def done(verb: str, *arguments: str) -> int:
        given = amount if verb == "sample" else [*amount, "--data", f"{folder / 'text.txt'}:1"]
        saved = ["--load", str(folder / "dense"), "--save", str(folder / "".join([verb, *arguments, ".safetensors"]))]
        words = [sys.executable, "-c", COUNTER, verb, *saved, *given, *arguments]
        return int(subprocess.run(words, capture_output=True, text=True, check=True, timeout=280).stdout.split()[-1])

    def counted(*names: str, **cut: int) -> float:
        setup = Setup(config=config, target=dataclasses.replace(config, **cut), samples=64, sample_length=64, passes=2)
        return sum(step.work(setup).operations for step in STEPS if step.name in names)

    return done, counted


FITTED = ["prune", "--metric", "random", "--reconstruct", "2"]
MOMENTS = 64 * 64 * 2 * (384**2 + 192**2)
"""Products of the second moments that costs need besides: half of a matrix a site, layer by layer."""


@pytest.mark.slow
@pytest.mark.parametrize(
    "words, steps, cut, besides",
    [
        (["sample"], ["sampling text"], {}, 0),
        (["score", "--metrics", "activation"], ["measuring"], {}, 0),
        (["score", "--metrics", "fisher"], ["scoring by gradients"], {}, 0),
        (["score", "--metrics", "random", "--costs"], ["measuring", "costs of blocks"], {}, MOMENTS),
        ([*FITTED, "--ffn-hidden-size-remain", "256"], ["re-fitting"], {"ffn_hidden_size": 256}, 0),
        ([*FITTED, "--hidden-size-remain", "144"], ["measuring", "re-fitting"], {"hidden_size": 144}, 0),
    ],
    ids=["sampling", "measuring", "gradients", "costs", "re-fitting", "re-fitting a rotated stream"],
)
def test_steps_do_the_work_that_the_estimate_counts(counting, words, steps, cut, besides):
    """Matrix products that torch counts in real runs; it counts neither attention's kernel nor factors, which are few here."""
    done, counted = counting
    assert done(*words) == pytest.approx(counted(*steps, **cut) + besides, rel=0.3)


@pytest.mark.slow
def test_recovery_takes_the_memory_and_the_time_that_the_estimate_says(tmp_path, capsys):
    """Memory within a third; the time of a larger model from the speed that a smaller one reached, within a half."""
    from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder

    builder = IndexedDatasetBuilder(str(tmp_path / "data.bin"), dtype=numpy.uint16)
    for seed in range(8):
        builder.add_item(torch.randint(2, 30000, (600,), generator=torch.Generator().manual_seed(seed)))
        builder.end_document()
    builder.finalize(str(tmp_path / "data.idx"))
    data = ["--data-path", str(tmp_path / "data"), "--split", "60,40,0", "--seq-length", "128", "--global-batch-size", "2"]
    often = {"--train-iters": "4", "--save-interval": "4", "--eval-iters": "1", "--log-interval": "2"}
    run = [*data, "--micro-batch-size", "2", *(word for pair in often.items() for word in pair)]
    speeds, estimates = {}, {}
    for layers in (2, 5):
        sizes = {"hidden_size": 768, "intermediate_size": 2560, "num_hidden_layers": layers, "max_position_embeddings": 128}
        build_tiny(tmp_path / f"m{layers}", head_dim=64, vocab_size=32000, **sizes)
        start = str(tmp_path / f"start{layers}")
        convert(ConvertOptions(load=str(tmp_path / f"m{layers}"), save=start), World())
        capsys.readouterr()
        asked = ["--seq-length", "128", "--micro-batch-size", "2", "--train-tokens", "1e6"]
        main(["estimate", start, *asked, "--device-tflops", "0.1", "--mfu", "1", "--json"])
        estimates[layers] = json.loads(capsys.readouterr().out)["steps"]["recovery"]
        measured = peak("recover", "--load", start, "--save", str(tmp_path / f"run{layers}"), *run)
        parts, config = estimates[layers]["parts"], huggingface.open_model(tmp_path / f"m{layers}").config
        saving = saving_memory(config, ParallelLayout(), Training(), bucket=None)
        expected = sum(parts.values()) - parts["activations"] + max(parts["activations"], saving)
        assert 0.75 < measured / expected < 1.34, (measured, expected, parts, saving)
        records = [json.loads(line) for line in (tmp_path / f"run{layers}" / "history.jsonl").read_text().splitlines()]
        speeds[layers] = max(record.get("tokens_per_second", 0) for record in records)
    assert estimates[5]["seconds"] / estimates[2]["seconds"] == pytest.approx(speeds[2] / speeds[5], rel=0.5)


@pytest.mark.parametrize("tp, pp", [(1, 1), (3, 2), (6, 4)])
def test_the_fullest_rank_holds_what_the_estimate_says(tiny, tmp_path, tp, pp):
    source = tiny("qwen3", tie_word_embeddings=False)
    options = ConvertOptions(
        load=str(source),
        save=str(tmp_path / "m"),
        target_tensor_parallel_size=tp,
        target_pipeline_parallel_size=pp,
        ckpt_format="torch",
    )
    convert(options, World())
    held = []
    for file in (tmp_path / "m" / "release").glob("mp_rank_*/model_optim_rng.pt"):
        with torch.serialization.safe_globals([argparse.Namespace]):
            model = torch.load(file, weights_only=True)["model"]
        held.append(sum(value.numel() for value in model.values() if value is not None))
    config = huggingface.open_model(source).config
    estimate = rank_parameters(config, ParallelLayout(tensor=tp, pipeline=pp))
    assert max(held) <= estimate <= max(held) + config.hidden_size * (pp > 1)


def test_inspect_counts_what_is_stored(tiny, tmp_path, capsys):
    source = tiny("llama", tie_word_embeddings=True)
    main(["inspect", str(source), "--json"])
    facts = json.loads(capsys.readouterr().out)
    stored = state_dict(source)
    assert facts["parameters"] == sum(tensor.numel() for tensor in stored.values())
    assert facts["weight_bytes"] == sum(tensor.numel() * 2 for tensor in stored.values())
    assert facts["dtype"] == {"bfloat16": len(stored)}
    convert(ConvertOptions(load=str(source), save=str(tmp_path / "m"), target_tensor_parallel_size=4), World())
    main(["inspect", str(tmp_path / "m"), "--json"])
    again = json.loads(capsys.readouterr().out)
    assert again["parallel"] == {"tensor": 4, "pipeline": 1} and again["parameters"] == facts["parameters"]
    assert again["recipe"][0]["step"] == "convert"


def test_estimate_needs_no_weights(tiny, tmp_path, capsys):
    source = tiny("mistral")
    (tmp_path / "config.json").write_text((source / "config.json").read_text())
    main(
        [
            "estimate",
            str(tmp_path / "config.json"),
            "--ffn-hidden-size-remain",
            "48",
            "--target-tensor-parallel-size",
            "2",
            "--json",
        ]
    )
    facts = json.loads(capsys.readouterr().out)
    config = huggingface.open_model(source).config
    assert facts["steps"]["sampling text"]["disk"] == 8 * 128 * 64  # the context is 64
    assert facts["parameters"] == parameter_count(config)
    assert facts["target_parameters"] == parameter_count(config) - 4 * 3 * 48 * 48
    assert facts["steps"]["cutting"]["disk"] == 2 * facts["target_parameters"]


@pytest.fixture
def estimated(capsys):
    """What ``estimate`` says of a model, as JSON."""

    def of(*arguments: str) -> dict:
        capsys.readouterr()
        main(["estimate", *map(str, arguments), "--json"])
        return json.loads(capsys.readouterr().out)

    return of


ONE_SHAPE = ["--multiple-of", "hidden=48,ffn=16,head=12,kv_head=12,layer=4"]
"""Steps that leave no axis of the tiny model but one."""


@pytest.mark.parametrize("budget", [["--ratio", "0.2"], ["--params", "150K"], ["--memory", "400KB", "--memory-seq-length", "64"]])
def test_a_budget_leads_to_the_shape_that_prune_takes(tiny, tmp_path, estimated, budget):
    source = tiny("llama")
    facts = estimated(source, *budget, *ONE_SHAPE)
    assert facts["shapes_within_budget"] == 1
    saved = str(tmp_path / "p")
    main(["prune-hf", "--load", str(source), "--save", saved, *budget, *ONE_SHAPE, "--metric", "magnitude"])
    config = huggingface.open_model(tmp_path / "p").config
    assert facts["shape"] == {name: getattr(config, name) for name in facts["shape"]}
    assert facts["target_parameters"] == parameter_count(config) < facts["parameters"]


def test_of_several_shapes_within_a_budget_it_says_so(tiny, capsys):
    main(["estimate", str(tiny("llama")), "--ratio", "0.3"])
    said = capsys.readouterr().out
    among = int(said.partition("shapes within the budget: ")[2].split(";")[0])
    assert among > 1 and "its scores may choose another" in said


def test_what_does_not_fit_a_device_is_said_with_what_would(tiny, estimated):
    source = tiny("llama")
    cut = ("--ffn-hidden-size-remain", "64")
    whole = estimated(source, *cut, "--device-memory", "80GiB")["steps"]
    assert all(need["fits"] for need in whole.values())
    need = whole["recovery"]["device_memory_per_rank"]
    small = estimated(source, *cut, "--device-memory", str(need - 1))["steps"]["recovery"]
    assert not small["fits"] and small["would_fit_with"]
    words = small["would_fit_with"].replace(",", "").split()
    assert estimated(source, *cut, *words, "--device-memory", str(need - 1))["steps"]["recovery"]["fits"]
    for name, step in whole.items():
        if name in ("conversion", "cutting", "export"):
            assert step["device_memory_per_rank"] == 0  # streamed through the host


def test_a_recovery_is_estimated_with_the_flags_that_recover_gets(tiny, estimated):
    source = [tiny("llama"), "--target-tensor-parallel-size", "2", "--seq-length", "64"]
    parts = lambda *flags: estimated(*source, *flags)["steps"]["recovery"]["parts"]
    plain, split = parts(), parts("--sequence-parallel")
    config = huggingface.open_model(source[0]).config
    assert plain["activations"] - split["activations"] == 4 * 64 * 4 * 4 * config.hidden_size // 2  # of 4 layers 4 streams
    assert parts("--recompute") == parts("--recompute-granularity", "full") != plain
    half = parts("--bf16")
    assert 2 * half["weights"] == plain["weights"] and 2 * half["optimizer"] == 3 * plain["optimizer"]
    for wrong in (["--bf16", "--fp16"], ["--recompute-method", "block"], ["--sequence-parallel", "--seq-length", "63"]):
        with pytest.raises(SystemExit) as found:
            main(["estimate", *map(str, source), *wrong])
        assert found.value.code == 2


def test_time_follows_from_the_rates(tiny, estimated):
    source = tiny("llama")
    seconds = lambda *flags: {
        name: step["seconds"] for name, step in estimated(source, "--num-layers-remain", 3, *flags)["steps"].items()
    }
    plain, disk, device = seconds(), seconds("--disk-bandwidth", "2"), seconds("--mfu", "0.2")
    assert all(time > 0 for time in plain.values())
    for name in ("conversion", "cutting", "export"):
        assert disk[name] == pytest.approx(plain[name] / 2) and device[name] == plain[name]
    assert device["recovery"] == pytest.approx(2 * plain["recovery"]) and disk["recovery"] == plain["recovery"]
    assert device["re-fitting"] > plain["re-fitting"] > disk["re-fitting"]


def test_prune_says_first_what_it_will_do(tiny, tmp_path, capsys):
    source, text = tiny("llama"), tmp_path / "text.txt"
    text.write_text("".join(f"{number} boxers chase {number * 7}. " for number in range(400)))
    given = ["--data", f"{text}:1", "--nsamples", "4", "--seq-length", "32", "--reconstruct", "1"]
    cut = ["--ffn_hidden_size_remain", "64", "--num_layers_remain", "3"]
    main(["prune-hf", "--load", str(source), "--save", str(tmp_path / "p"), *cut, *given])
    said = [line.removeprefix("INFO: ") for line in capsys.readouterr().err.splitlines() if line.startswith("INFO: ")]
    count = lambda config: f"{parameter_count(config):,}"
    before, after = huggingface.open_model(source).config, huggingface.open_model(tmp_path / "p").config
    sizes = f"feed-forward channels 96 → 64, layers 4 → 3, parameters {count(before)} → {count(after)}"
    assert said[0].startswith(f"to be cut: {sizes}")
    assert said[1] == f"text: {text} (100%): 4 samples each of 32 tokens"
    assert said[2] == "steps: measuring, scoring by gradients, re-fitting, cutting and writing, checking what was written"
    for label in ("measuring", "gradients", "re-fitting"):
        assert len([line for line in said[3:] if line.startswith(f"{label}: about ")]) == 1


# ------------------------------------------------------------------------------------------------ what prune is asked


WITHOUT_COST = {
    *("load", "save", "tokenizer", "ckpt_format", "transformer_impl", "megatron", "overwrite", "strict", "no_check", "save_plan"),
    *("seed", "data_field", "seq_length", "scores", "uniform", "sequential", "ridge", "reader_ridge"),
    *("tensor_model_parallel_size", "pipeline_model_parallel_size"),
}
"""Options of prune that an estimate does not take: --seq-length is recover's there (prune's is --sample-length), sizes of ranks have
names of their own, and --sequential may fit once or twice, as the loss then says."""


def test_an_estimate_takes_what_prune_takes_from_the_same_fields():
    ours, theirs = ({item.name: item for item in dataclasses.fields(options_of(verb))} for verb in ("estimate", "prune"))
    assert set(theirs) - set(ours) == WITHOUT_COST - {"load", "seq_length"}
    for name in set(ours) & set(theirs) - {"load", "seq_length"}:
        assert (ours[name].metadata, ours[name].default) == (theirs[name].metadata, theirs[name].default), name


BUDGET = ["--ratio", "0.2", *ONE_SHAPE]


@pytest.mark.parametrize(
    "asked",
    [
        BUDGET,
        [*BUDGET, "--quick"],
        [*BUDGET, "--metric", "wanda", "--no-refit"],
        ["--num-layers-remain", "3", "--nsamples", "4"],
        ["--hidden-size-remain", "36", "--data", "{text}:1", "--nsamples", "4"],
        ["--ffn-hidden-size-remain", "64", "--data", "{text}", "--quick"],
        ["--drop-mlp", "1", "--quick", "--target-family", "llama-per-layer"],
    ],
    ids=lambda words: " ".join(words[-2:]),
)
def test_the_steps_and_the_text_are_those_that_prune_announces(tiny, tmp_path, estimated, capsys, asked):
    """Of a real run: the text and the passes that it says before it begins."""
    source, text = tiny("llama"), tmp_path / "text.txt"
    text.write_text("".join(f"{number} boxers chase {number * 7}. " for number in range(2000)))
    asked = [word.format(text=text) for word in asked]
    foreseen = estimated(source, *asked)
    main(["prune-hf", "--load", str(source), "--save", str(tmp_path / "p"), *asked])
    said = capsys.readouterr().err
    steps = re.search(r"INFO: steps: (.*), cutting and writing", said)[1].split(", ")
    assert [name for name in foreseen["steps"] if name not in ("conversion", "cutting", "export", "recovery")] == steps
    names, each, length = re.search(r"INFO: text: (.*): (\d+) samples each of (\d+) tokens", said).groups()
    assert foreseen["text"] == {"samples": int(each) * len(names.split(" and ")), "sample_length": int(length)}
    config = huggingface.open_model(tmp_path / "p").config
    assert foreseen["target_parameters"] == parameter_count(config)


def test_quick_is_quicker(tiny, estimated):
    source = tiny("llama")
    passes = ("sampling text", "measuring", "scoring by gradients", "re-fitting")
    seconds = lambda steps: sum(steps[name]["seconds"] for name in passes if name in steps)
    slow = ["--device-tflops", "0.01", "--device-tflops-full", "0.01", "--device-bandwidth", "0.01"]  # else reading is most of it
    plain, quick = (estimated(source, *BUDGET, *slow, *more)["steps"] for more in ([], ["--quick"]))
    assert seconds(quick) < 0.3 * seconds(plain)
    assert "scoring by gradients" in plain and "scoring by gradients" not in quick
    assert quick["re-fitting"]["seconds"] < plain["re-fitting"]["seconds"]
    for kept in ("conversion", "recovery"):
        assert quick[kept] == plain[kept]


def test_every_fit_of_a_search_is_counted(tiny, estimated):
    source = tiny("llama")
    one, three = (estimated(source, "--ratio", "0.3", "--search", count)["steps"]["re-fitting"] for count in (1, 3))
    assert three["seconds"] == pytest.approx(3 * one["seconds"]) and three["disk"] == 3 * one["disk"]


SMALL_QWEN = {"hidden_size": 192, "num_attention_heads": 12, "num_key_value_heads": 6, "head_dim": 16, "intermediate_size": 384}


def test_a_budget_searches_shapes_that_are_served_alone(tiny, estimated):
    source = tiny("qwen2", **SMALL_QWEN)
    free, served = (estimated(source, "--ratio", "0.3", *more) for more in ([], ["--serve", "vllm,tp=4"]))
    sizes = served["shape"]
    assert 0 < served["shapes_within_budget"] < free["shapes_within_budget"]
    assert sizes["ffn_hidden_size"] % 4 == sizes["num_attention_heads"] % 4 == 0
    assert sizes["hidden_size"] // sizes["num_attention_heads"] == 16  # what vLLM takes for Qwen2's head_dim


@pytest.mark.parametrize(
    "asked",
    [
        ["--ffn-hidden-size-remain", "61", "--serve", "tp=2"],
        ["--ratio", "0.2", "--serve", "tensorrt"],
        ["--ratio", "0.2", "--num-layers-remain", "3"],
        ["--num-layers-remain", "3", "--search", "2"],
        ["--num-layers-remain", "3", "--allocate", "free"],
        ["--num-layers-remain", "3", "--metric", "magnitude", "--quick"],
        ["--num-attention-heads-remain", "5"],
        ["--ratio", "0.2", "--metric", "obz"],
        ["--multiple-of", "ffn=0", "--ratio", "0.2"],
    ],
    ids=" ".join,
)
def test_what_prune_refuses_an_estimate_refuses_in_the_same_words(tiny, tmp_path, capsys, asked):
    source, said = str(tiny("llama")), []
    for words in (["estimate", source], ["prune-hf", "--load", source, "--save", str(tmp_path / "p")]):
        with pytest.raises(SystemExit) as stop:
            main([*words, *asked])
        said.append((stop.value.code, capsys.readouterr().err.partition(": ")[2]))
    assert said[0] == said[1] and said[0][0] == 2 and said[0][1]


def test_where_no_shape_is_named_only_what_has_a_meaning_is_said(tiny, estimated, capsys):
    source = str(tiny("llama"))
    facts = estimated(source)
    assert not facts["shape_named"] and list(facts["steps"]) == ["conversion", "export", "recovery"]
    assert facts["target_parameters"] == facts["parameters"] and facts["text"] is None
    main(["estimate", source])
    said = capsys.readouterr().out
    assert "no shape is named" in said and "re-fitting" not in said and "%)" not in said
    for idle in (["--quick"], ["--serve", "vllm"], ["--nsamples", "4"], ["--sample-length", "8"], ["--dtype", "bf16"]):
        with pytest.raises(SystemExit) as stop:
            main(["estimate", source, *idle])
        assert stop.value.code == 2 and f"{idle[0]} without a shape" in capsys.readouterr().err


@pytest.mark.parametrize(
    "flags, said",
    [
        (["--mfu", "2"], "--mfu: 2.0 is not above 0 and at most 1"),
        (["--mfu", "40"], "--mfu: 40.0 is not above 0"),
        (["--device-memory", "80"], "got: 80: 80 bytes\n  needed: a size with its unit, such as 80GiB; at least 1.0 GiB"),
        (["--device-memory", "0.5GiB"], "--device-memory"),
        (["--device-memory", "-1GiB"], "--device-memory\n  got: '-1GiB'\n  needed: a size"),
        (["--device-tflops", "-3"], "--device-tflops: -3.0 is not a positive number"),
        (["--disk-bandwidth", "0"], "--disk-bandwidth: 0.0 is not a positive number"),
        (["--train-tokens", "-1"], "--train-tokens\n  got: '-1'\n  needed: a count"),
        (["--train-tokens", "12 BB"], "--train-tokens"),
        (["--micro-batch-size", "0"], "--micro-batch-size: 0 is not a positive number"),
        (["--lora-r", "-2"], "--lora-r: -2 is not a positive number"),
        (["--ratio", "1.5"], "--ratio: 1.5 is not above 0 and below 1"),
        (["--nsamples", "1GiB"], "--nsamples: '1GiB' is not a whole number"),
        (["--nsamples", "-1GiB"], "--nsamples: '-1GiB' is not a whole number"),
        (["--memory", "-2GiB"], "--memory\n  got: '-2GiB'"),
    ],
)
def test_nonsense_is_refused_naming_what_is_wrong_with_it(tiny, capsys, flags, said):
    with pytest.raises(SystemExit) as stop:
        main(["estimate", str(tiny("llama")), *flags])
    assert stop.value.code == 2 and said in capsys.readouterr().err


AGAIN = [["--recompute"], ["--recompute-activations"], ["--recompute-granularity", "full"]]


@pytest.mark.parametrize("first, second", itertools.combinations(AGAIN, 2))
def test_what_is_worked_out_again_is_said_once_in_both_verbs(tiny, tmp_path, capsys, first, second):
    convert(ConvertOptions(load=str(tiny("llama")), save=str(tmp_path / "m")), World())
    run = ["recover", "--load", str(tmp_path / "m"), "--save", str(tmp_path / "run"), "--train-iters", "1", "--data-path", "x"]
    for words in (["estimate", str(tmp_path / "m")], run):
        with pytest.raises(SystemExit) as stop:
            main([*words, *first, *second])
        assert stop.value.code == 2
        assert f"{first[0]} and {second[0]} both say what is worked out again" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def large(folder) -> str:
    sizes = {"hidden_size": 8192, "intermediate_size": 28672, "num_attention_heads": 64, "num_key_value_heads": 8}
    said = {"num_hidden_layers": 80, "vocab_size": 128256, "max_position_embeddings": 131072, "rms_norm_eps": 1e-5, **sizes}
    said |= {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "tie_word_embeddings": False}
    (folder / "config.json").write_text(json.dumps(said))
    return str(folder / "config.json")


@pytest.mark.parametrize("columns", ["80", None])
def test_the_table_of_a_large_model_is_read_on_80_columns_and_whole_without_a_terminal(tmp_path, capsys, monkeypatch, columns):
    monkeypatch.setenv("COLUMNS", columns) if columns else monkeypatch.delenv("COLUMNS", raising=False)
    spread = ["--target-tensor-parallel-size", "8", "--data-parallel-size", "64"]
    main(["estimate", large(tmp_path), "--ratio", "0.25", *spread, "--device-memory", "80GiB"])
    lines = capsys.readouterr().out.partition("\nfeed-forward")[0].splitlines()
    assert columns is None or max(map(len, lines)) <= 80
    body = "\n".join(lines)
    for word in ("conversion", "sampling text", "measuring", "re-fitting", "cutting", "export", "recovery", "device", "fits"):
        assert word in body
    assert "…" not in body
    row = next(line for line in lines if line.lstrip().startswith("recovery"))
    assert re.search(r"\d\.\d GiB .*TiB .* GB +\d+ d \d+ h +no$", row.rstrip())
    assert columns or re.search("scoring by gradients +[0-9]", body)


def test_a_plan_is_estimated_as_it_is_applied(tiny, tmp_path, estimated):
    """Without text nothing is fitted; with text it is."""
    source, plan = str(tiny("llama")), str(tmp_path / "plan.json")
    cut = ["--ffn-hidden-size-remain", "64", "--num-layers-remain", "3", "--metric", "magnitude"]
    main(["prune-hf", "--load", source, "--save", str(tmp_path / "p"), *cut, "--save-plan", plan])
    held = parameter_count(huggingface.open_model(tmp_path / "p").config)
    applied, fitted = estimated(source, "--plan", plan), estimated(source, "--plan", plan, "--data", "self")
    assert applied["target_parameters"] == fitted["target_parameters"] == held
    assert list(applied["steps"]) == ["conversion", "cutting", "export", "recovery"] and applied["text"] is None
    assert {"sampling text", "re-fitting"} <= set(fitted["steps"])


def test_a_vocabulary_that_is_cut_counts(tiny, tmp_path, estimated):
    from megatron_prune.planning.plan import whole_plan

    source = tiny("llama", tie_word_embeddings=False)
    config = huggingface.open_model(source).config
    plan = whole_plan(config, {}, None)
    kept = list(range(0, config.vocab_size, 2))
    (tmp_path / "v.json").write_text(dataclasses.replace(plan, new={**plan.new, "vocab_size": len(kept)}, vocab=kept).dumps())
    alone = estimated(source, "--vocab-plan", tmp_path / "v.json")
    assert alone["parameters"] - alone["target_parameters"] == 2 * config.hidden_size * (config.vocab_size - len(kept))
    assert "re-fitting" not in alone["steps"]
    both = estimated(source, "--vocab-plan", tmp_path / "v.json", "--ffn-hidden-size-remain", "64")
    assert both["target_parameters"] < alone["target_parameters"] and "re-fitting" in both["steps"]
