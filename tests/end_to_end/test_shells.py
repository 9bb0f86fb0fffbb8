"""The ways in: scripts, tools, Megatron's own arguments."""

from __future__ import annotations

import json
import re
import socket
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import rank_jobs
from rank_jobs_recovery import recover, teach
from shells import ROOT, bash, given_to_python, given_to_torchrun, run_file

from megatron_prune.checkpoint import megatron
from megatron_prune.cli.parser import parse
from megatron_prune.errors import InputError
from megatron_prune.runtime.world import World
from megatron_prune.steps.convert import ConvertOptions, convert
from megatron_prune.steps.preprocess import PreprocessOptions, preprocess
from megatron_prune.steps.prune import PruneOptions, prune
from megatron_prune.recovery.options import RecoverOptions


@pytest.fixture
def stub(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("stub")


def test_the_scripts_run_the_whole_path_under_torchrun(tiny, tmp_path, stub):
    """Pruning under torchrun; what the other scripts give to Python is run in this process."""
    hf = {"HF_DIR": tiny("qwen2"), "SAVE_DIR": tmp_path / "m", "TP": 2}
    assert run_file(*given_to_python(stub, "tools/checkpoint_conversion/hf_to_megatron.sh", **hf)) == 0
    settings = {
        "LOAD_DIR": tmp_path / "m",
        "SAVE_DIR": tmp_path / "p",
        "TP": 2,
        "FFN_HIDDEN_SIZE_REMAIN": 64,
        "DROP_LAYERS": "1,2",
        "DROP_ATTENTION": "3",
        "TARGET_FAMILY": "qwen2-per-layer",
        "PRUNE_TYPE": "global",
        "METRIC": "random",
        "SAVE_PLAN": tmp_path / "plan.json",
        "GPT_ARGS": "--num-layers 4 --hidden-size 48 --swiglu --bf16 --micro-batch-size 1 --lr 1e-4",
    }
    done = bash("scripts/prune_llama.sh", "--strict", **settings)
    assert done.returncode == 0, done.stderr
    moved = {"LOAD_DIR": tmp_path / "p", "SAVE_DIR": tmp_path / "t", "CKPT_FORMAT": "torch"}
    assert run_file(*given_to_python(stub, "scripts/transfer.sh", **moved)) == 0
    assert run_file(*given_to_python(stub, "scripts/megatron_to_hf.sh", LOAD_DIR=tmp_path / "t", SAVE_DIR=tmp_path / "back")) == 0
    assert megatron.open_checkpoint(tmp_path / "t").format == "torch"
    config = json.loads((tmp_path / "back" / "config.json").read_text())
    assert config["num_hidden_layers"] == 2
    said = lambda layer: {"intermediate_size": config["intermediate_size"]} | config["per_layer_config"].get(layer, {})
    assert [said(layer)["intermediate_size"] for layer in "01"] == [64, 64]
    assert [said(layer).get("skip") for layer in "01"] == [None, ["attention"]]
    assert json.loads((tmp_path / "plan.json").read_text())["new"]["num_layers"] == 2


def test_a_script_names_the_setting_it_lacks():
    done = bash("scripts/prune_llama.sh")
    assert done.returncode == 2 and "LOAD_DIR" in done.stderr


@pytest.mark.parametrize("tool", sorted((ROOT / "tools/checkpoint_conversion").glob("*.py")), ids=lambda path: path.name)
def test_every_tool_explains_itself(tool, capsys):
    assert run_file(str(tool), "--help") == 0 and "--load-dir" in capsys.readouterr().out


def test_megatrons_arguments_must_agree_with_the_checkpoint(tiny, tmp_path):
    convert(ConvertOptions(load=str(tiny("qwen2")), save=str(tmp_path / "m")), World())
    base = ["--load", str(tmp_path / "m"), "--save", str(tmp_path / "p"), "--ffn_hidden_size_remain", "64", "--metric", "random"]
    agreeing = [
        "--num-layers",
        "4",
        "--num_attention_heads",
        "12",
        "--add-qkv-bias",
        "--group-query-attention",
        "--seq-length",
        "64",
    ]
    agreeing += ["--untie-embeddings-and-output-weights", "--normalization", "RMSNorm", "--train-iters", "500000"]
    prune(parse(PruneOptions, [*base, *agreeing], prog="prune"), World())
    contradicting = ["--num-layers", "5", "--hidden-size", "64", "--qk-layernorm", "--normalization", "LayerNorm", "--overwrite"]
    with pytest.raises(InputError) as error:
        prune(parse(PruneOptions, [*base, *contradicting], prog="prune"), World())
    for word in ("num-layers 5", "hidden-size 64", "qk-layernorm", "layernorm"):
        assert word in str(error.value)


def test_an_unknown_argument_is_refused():
    with pytest.raises(InputError, match="--hidden_size_remian is no flag of prune; did you mean --hidden-size-remain?"):
        parse(PruneOptions, ["--load", "a", "--save", "b", "--hidden_size_remian", "3"], prog="prune")


@pytest.mark.parametrize("save", ["m", ".", "m/../m"])
def test_an_output_that_would_take_the_input_away_is_refused(tiny, tmp_path, monkeypatch, save):
    monkeypatch.chdir(tmp_path)
    convert(ConvertOptions(load=str(tiny("qwen2")), save="m"), World())
    with pytest.raises(InputError, match="is, holds or lies in the input"):
        prune(
            parse(
                PruneOptions,
                ["--load", "m/release", "--save", save, "--ffn_hidden_size_remain", "64", "--overwrite"],
                prog="prune",
            ),
            World(),
        )
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["m"]


def test_two_machines_prune_as_one_does(tiny, tmp_path, stub, ranks):
    """Two torchrun agents with different node ranks, through the script and its variables, on loopback."""
    convert(ConvertOptions(load=str(tiny("qwen2")), save=str(tmp_path / "m"), target_tensor_parallel_size=2), World())
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    settings = {"LOAD_DIR": tmp_path / "m", "TP": 2, "FFN_HIDDEN_SIZE_REMAIN": 32, "METRIC": "magnitude"}
    nodes = {"NNODES": 2, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "SAVE_DIR": tmp_path / "two"}
    with ThreadPoolExecutor(2) as pool:
        agents = [pool.submit(bash, "scripts/prune_llama.sh", **settings, **nodes, NODE_RANK=rank) for rank in (0, 1)]
    for agent in agents:
        assert agent.result().returncode == 0, agent.result().stderr
    _, *arguments = given_to_torchrun(stub, 2, "scripts/prune_llama.sh", **settings, SAVE_DIR=tmp_path / "one")
    ranks(2).run(rank_jobs.run_steps, ("prune", vars(parse(PruneOptions, arguments, prog="prune"))))
    plans = [(tmp_path / name / "release/plan.json").read_text() for name in ("one", "two")]
    manifests = [json.loads((tmp_path / name / "release/megatron_prune.json").read_text()) for name in ("one", "two")]
    digests = [manifest["files"].pop("common.pt") for manifest in manifests]  # its args name the tokenizer by its place
    assert plans[0] == plans[1] and manifests[0] == manifests[1] and digests[0] != digests[1]


def test_the_script_scores_re_fits_and_keeps_to_a_budget_with_its_settings(tiny, tmp_path, stub, ranks):
    """The default metric, on text and own samples mixed, two sources in one variable."""
    convert(ConvertOptions(load=str(tiny("qwen2")), save=str(tmp_path / "m")), World())
    (tmp_path / "text").write_text("words and more words, " * 200)
    settings = {"LOAD_DIR": tmp_path / "m", "SAVE_DIR": tmp_path / "p", "TP": 2, "RATIO": 0.25}
    settings |= {"DATA": f"{tmp_path / 'text'}:0.5 self:0.5", "SAVE_PLAN": tmp_path / "plan.json"}
    few = ("--nsamples", "4", "--seq-length", "16")
    script, *arguments = given_to_torchrun(stub, 2, "scripts/prune_llama.sh", *few, **settings)
    assert script == str(ROOT / "prune_llama.py")
    ranks(2).run(rank_jobs.run_steps, ("prune", vars(parse(PruneOptions, arguments, prog="prune"))))
    made_by = json.loads((tmp_path / "plan.json").read_text())["made_by"]
    assert made_by["metric"]["ffn"] == "fisher" and "refit" in made_by
    assert [source["share"] for source in made_by["calibration"]["sources"]] == [0.5, 0.5]


def test_the_script_recovers_with_its_settings(tiny, tmp_path, stub, ranks):
    """S4's name for it; a blend in one variable, a teacher's answers, adapters, two copies."""
    load, text = tmp_path / "m", tmp_path / "text.jsonl"
    convert(ConvertOptions(load=str(tiny("qwen2")), save=str(load)), World())
    text.write_text("".join(json.dumps({"text": f"Sentence {number} of a text. " * 3}) + "\n" for number in range(100)))
    pair = tmp_path / "pair_text_document"
    preprocess(PreprocessOptions(input=(str(text),), tokenizer=str(load), save=str(tmp_path / "pair"), workers=1), World())
    blend = f"0.7 {pair} 0.3 {pair}"
    lesson = {"load": str(load), "save": str(tmp_path / "taught"), "data_path": tuple(blend.split()), "top_k": 5}
    teach(World(), {**lesson, "train_iters": 2, "global_batch_size": 4, "seq_length": 16, "eval_iters": 1})
    settings = {"LOAD_DIR": load, "SAVE_DIR": tmp_path / "run", "DATA_PATH": blend, "TP": 1, "DP": 2, "DTYPE": "fp32"}
    settings |= {"TRAIN_ITERS": 2, "SEQ_LENGTH": 16, "GLOBAL_BATCH_SIZE": 4, "MICRO_BATCH_SIZE": 2, "LR": 1e-2, "LORA_R": 2}
    settings |= {"TEACHER_LOGITS": tmp_path / "taught", "GPT_ARGS": "--num-layers 4 --swiglu --attention-dropout 0.0"}
    further = ("--eval-iters", "1", "--lr-warmup-iters", "1")
    said = given_to_torchrun(stub, 2, "scripts/check_model.sh", *further, **settings)
    assert said[:3] == ["-m", "megatron_prune", "recover"]
    assert ranks(2).run(recover, vars(parse(RecoverOptions, said[3:], prog="recover"))) == [0, 0]
    summary = json.loads((tmp_path / "run/summary.json").read_text())
    asked = {"global_batch_size": 4, "lora_r": 2, "lr": 1e-2, "bf16": False, "data_path": blend.split()}
    assert summary["finished"] and {name: summary["settings"][name] for name in asked} == asked
    assert summary["held_out_loss"] != summary["start_loss"]
    assert "kl" in (tmp_path / "run/history.jsonl").read_text()


@pytest.mark.parametrize("machines", [1, 2])
def test_bad_input_is_not_tried_again(tmp_path, machines):
    """What a process says of its input it would say after every restart."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    settings = {"LOAD_DIR": tmp_path / "none", "SAVE_DIR": tmp_path / "run", "DATA_PATH": "x", "DP": 2, "MAX_RESTARTS": 2}
    settings |= {"NNODES": machines, "MASTER_PORT": port, "LOCAL_ADDR": "127.0.0.1"}
    with ThreadPoolExecutor(machines) as pool:
        agents = [pool.submit(bash, "scripts/recover.sh", **settings, NODE_RANK=rank) for rank in range(machines)]
    done = [agent.result() for agent in agents]
    said = "".join(each.stderr for each in done)
    assert done[0].returncode == 2 and all(each.returncode for each in done), said
    told = re.findall(r"\[rank (\d)\] .*none: no such file or directory", said)
    # Once a rank: no rank was started again. How many but the first come to say it depends on how soon torchrun ends them.
    assert "0" in told and len(told) == len(set(told)), said


def test_a_process_that_is_lost_is_started_again_as_often_as_was_asked(tmp_path):
    program, job = tmp_path / "program.py", tmp_path / "job.sh"
    program.write_text(
        "import os, sys, time\n"
        "again = int(os.environ['TORCHELASTIC_RESTART_COUNT'])\n"
        "print('start', again, flush=True)\n"
        "sys.exit(0 if again >= int(sys.argv[1]) else 1)\n"
    )
    job.write_text(f"source '{ROOT}/scripts/launch.sh'\nlaunch '{program}' \"$@\"\n")
    for needed, code, starts in (("1", 0, ["start 0", "start 1"]), ("2", 1, ["start 0", "start 1"])):
        done = bash(str(job), needed, MAX_RESTARTS=1)
        assert (done.returncode, done.stdout.splitlines()) == (code, starts), done.stderr
