"""Adapters after training: resumed to the bit, merged, given to peft; where the model they belong on has moved; what is refused.

``tests/distributed/test_recover.py`` trains them beside peft.
"""

from __future__ import annotations

import json
import os
import shutil
import stat
from pathlib import Path

import pytest
import rank_jobs_recovery as jobs
import recovery_reference as reference
import torch
from huggingface_hub import ModelCard
from safetensors.torch import load_file
from tiny import logits, state_dict

from megatron_prune.checkpoint import torch_dist
from megatron_prune.errors import CheckpointError, InputError
from megatron_prune.runtime.world import World
from megatron_prune.steps.convert import ConvertOptions, convert
from megatron_prune.steps.export import ExportOptions, export
from megatron_prune.steps.prune import PruneOptions, prune
from megatron_prune.steps.transfer import TransferOptions, transfer

LORA = {"lora_r": 4, "lora_alpha": 8.0, "lora_dropout": 0.0}


@pytest.fixture(scope="module")
def home(tmp_path_factory, tiny) -> Path:
    """Models in float32 as ``hf`` and ``m``, ``other``, one of 2 KV groups ``grouped``, and a pair ``text``."""
    home = tmp_path_factory.mktemp("home")
    models = {"m": {}, "other": {"seed": 3}, "grouped": {"num_key_value_heads": 2}}
    for name, changes in models.items():
        source = tiny("llama", dtype="float32", num_hidden_layers=2, **changes)
        convert(ConvertOptions(load=str(source), save=str(home / name)), World())
        if name == "m":
            (home / "hf").symlink_to(source)
    reference.write_pair(home / "text", reference.documents(40))
    return home


def options(home: Path, save: Path, **changes) -> dict:
    common = {"load": str(home / "m"), "data_path": (str(home / "text"),), "split": "80,10,10", "seq_length": 16}
    common |= {"train_iters": 6, "global_batch_size": 6, "micro_batch_size": 3, "eval_iters": 1, "save_interval": 2}
    return {**common, "log_interval": 1, "lr": 3e-2, "min_lr": 1e-3, "lr_warmup_iters": 1, **LORA, "save": str(save), **changes}


@pytest.fixture(scope="module")
def trained(home, tmp_path_factory) -> Path:
    """A run that has ended."""
    save = tmp_path_factory.mktemp("trained") / "run"
    assert jobs.recover(World(), options(home, save)) == 0
    return save


# --------------------------------------------------------------------------------------------------------- what is written


def test_merged_and_through_peft_an_adapter_is_one_model_and_the_base_stays(home, trained, tmp_path):
    from peft import PeftModel

    before = {path: path.read_bytes() for path in (home / "m").rglob("*") if path.is_file()}
    export(ExportOptions(load=str(trained), save=str(tmp_path / "merged")), World())
    export(ExportOptions(load=str(trained), save=str(tmp_path / "peft"), adapter_only=True), World())
    merged = state_dict(tmp_path / "merged")
    expected = PeftModel.from_pretrained(reference.load(home / "hf"), tmp_path / "peft").merge_and_unload().state_dict()
    base = state_dict(home / "hf")
    assert set(merged) == set(base)
    for name, value in merged.items():
        torch.testing.assert_close(value, expected[name], rtol=1e-6, atol=1e-7)  # one sum in another order
        changed = "_proj." in name
        assert torch.equal(value, base[name]) is not changed, name
        assert not changed or (value - base[name]).abs().max() > 1e-3
    assert {path: path.read_bytes() for path in (home / "m").rglob("*") if path.is_file()} == before


def test_the_directory_says_what_it_belongs_on_and_peft_loads_it_as_it_is(home, trained, tmp_path):
    from peft import AutoPeftModelForCausalLM, LoraConfig

    before = os.umask(0o027)
    try:
        export(ExportOptions(load=str(trained), save=str(tmp_path / "peft"), adapter_only=True), World())
        export(ExportOptions(load=str(trained), save=str(tmp_path / "merged")), World())
    finally:
        os.umask(before)
    assert {stat.S_IMODE(file.stat().st_mode) for file in (*(tmp_path / "peft").iterdir(), *(tmp_path / "merged").iterdir())} == {
        0o640
    }
    model = AutoPeftModelForCausalLM.from_pretrained(tmp_path / "peft", dtype=torch.float32).eval()
    described = LoraConfig.from_pretrained(tmp_path / "peft")
    assert Path(described.base_model_name_or_path).samefile(home / "hf") and described.peft_version
    tokens = torch.arange(20)[None]
    with torch.no_grad():
        found = model(tokens).logits
    torch.testing.assert_close(found, logits(tmp_path / "merged", tokens), rtol=1e-4, atol=1e-4)
    assert (found - logits(home / "hf", tokens)).abs().max() > 1e-2
    card = ModelCard.load(tmp_path / "peft/README.md")
    assert card.data.to_dict() == {
        "library_name": "peft",
        "pipeline_tag": "text-generation",
        "tags": ["megatron-prune", "lora"],
    }  # a directory of this machine is no base that the hub knows
    code = card.text.partition("```python\n")[2].partition("```")[0]
    assert "A LoRA adapter (rank 4, alpha 8)" in card.text and "trust_remote_code" not in code
    there = Path.cwd()
    os.chdir(tmp_path)
    try:
        exec(compile(code, "README.md", "exec"), {})
    finally:
        os.chdir(there)


def test_an_adapter_on_a_model_of_the_hub_names_it_and_keeps_its_terms(home, tmp_path, monkeypatch):
    from hub_stand_in import TOKEN, Hub, serving
    from huggingface_hub import constants

    snapshot = tmp_path / "models--ada--tiny" / "snapshots" / ("0" * 40)
    shutil.copytree(home / "hf", snapshot)
    (snapshot / "README.md").write_text("---\nlicense: mit\nlanguage: en\nbase_model: ada/older\n---\n")
    (snapshot / "LICENSE").write_text("terms")
    convert(ConvertOptions(load=str(snapshot), save=str(tmp_path / "m")), World())
    run = str(tmp_path / "run")
    assert jobs.recover(World(), options(home, Path(run), load=str(tmp_path / "m"), train_iters=2)) == 0
    hub = Hub()
    with serving(hub) as address:
        monkeypatch.setattr(constants, "ENDPOINT", address)
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
        monkeypatch.setenv("HF_TOKEN", TOKEN)
        common = {"load": run, "adapter_only": True, "push_to_hub": "ada/adapter"}
        with pytest.raises(InputError, match="(?s)adapter on .*hf\n.*a directory of this machine.*--base-model-name"):
            export(ExportOptions(**common, save=str(tmp_path / "no"), base_model_name=str(home / "hf")), World())
        export(ExportOptions(**common, save=str(tmp_path / "peft")), World())
    assert hub.repos["ada/adapter"]["files"] == {file.name: file.read_bytes() for file in (tmp_path / "peft").iterdir()}
    assert sorted(hub.repos["ada/adapter"]["files"]) == [
        "LICENSE",
        "README.md",
        "adapter_config.json",
        "adapter_model.safetensors",
    ]
    assert json.loads((tmp_path / "peft/adapter_config.json").read_text())["base_model_name_or_path"] == "ada/tiny"
    data = ModelCard.load(tmp_path / "peft/README.md").data
    assert (data.base_model, data.base_model_relation, data.license, data.language) == ("ada/tiny", "adapter", "mit", "en")
    export(ExportOptions(load=run, save=str(tmp_path / "other"), adapter_only=True, base_model_name="ada/copy"), World())
    assert json.loads((tmp_path / "other/adapter_config.json").read_text())["base_model_name_or_path"] == "ada/copy"


def test_an_adapter_on_a_pruned_model_wants_that_models_directory(home, tmp_path):
    from peft import AutoPeftModelForCausalLM

    prune(PruneOptions(load=str(home / "m"), save=str(tmp_path / "p"), ffn_hidden_size_remain=48, metric="magnitude"), World())
    assert jobs.recover(World(), options(home, tmp_path / "run", load=str(tmp_path / "p"), train_iters=2)) == 0
    wanted = {"load": str(tmp_path / "run"), "save": str(tmp_path / "peft"), "adapter_only": True}
    with pytest.raises(InputError, match="(?s)not known.*pruned or trained.*megatron-prune export.*--base-model-name"):
        export(ExportOptions(**wanted), World())
    for name, message in ((str(home / "hf"), "hf is not the model"), ("no such/model/at all", "(?s)--base-model-name.*an id")):
        with pytest.raises(InputError, match=message):
            export(ExportOptions(**wanted, base_model_name=name), World())
    with pytest.raises(InputError, match="--base-model-name without --adapter-only"):
        export(ExportOptions(**{**wanted, "adapter_only": False}, base_model_name="ada/tiny"), World())
    assert not (tmp_path / "peft").exists()
    export(ExportOptions(load=str(tmp_path / "p"), save=str(tmp_path / "p-hf")), World())
    export(ExportOptions(**wanted, base_model_name=str(tmp_path / "p-hf")), World())
    export(ExportOptions(load=str(tmp_path / "run"), save=str(tmp_path / "merged")), World())
    model, tokens = (
        AutoPeftModelForCausalLM.from_pretrained(tmp_path / "peft", dtype=torch.float32).eval(),
        torch.arange(20)[None],
    )
    with torch.no_grad():
        torch.testing.assert_close(model(tokens).logits, logits(tmp_path / "merged", tokens), rtol=1e-4, atol=1e-4)


def test_a_checkpoint_holds_the_adapters_alone(trained):
    stored = torch_dist.read_tensors(trained / "iter_0000006", "")
    assert {name.split(".")[0] for name in stored} == {"adapter", "optimizer"}
    assert sum(name.startswith("adapter.layers.") for name in stored) == 2 * 7 * 2
    elements = sum(value.numel() for value in stored.values())
    inside = 2 * 4 * (4 * (48 + 96) + 3 * (48 + 96))  # layers · r · (in + out) of q, k, v, o of 96 channels and of the MLP
    assert inside <= elements <= 4 * inside + 200  # with the optimizer's three


def test_only_what_is_named_changes(home, tmp_path):
    assert jobs.recover(World(), options(home, tmp_path / "run", lora_targets=("linear_fc2", "k_proj"), train_iters=2)) == 0
    export(ExportOptions(load=str(tmp_path / "run"), save=str(tmp_path / "merged")), World())
    base, merged = state_dict(home / "hf"), state_dict(tmp_path / "merged")
    changed = {name for name in base if not torch.equal(base[name], merged[name])}
    assert changed == {f"model.layers.{n}.{each}.weight" for n in (0, 1) for each in ("mlp.down_proj", "self_attn.k_proj")}
    export(ExportOptions(load=str(tmp_path / "run"), save=str(tmp_path / "peft"), adapter_only=True), World())
    described = json.loads((tmp_path / "peft" / "adapter_config.json").read_text())
    assert (described["target_modules"], described["r"], described["lora_alpha"]) == (["down_proj", "k_proj"], 4, 8.0)
    assert len(load_file(tmp_path / "peft" / "adapter_model.safetensors")) == 2 * 2 * 2


def test_a_merge_by_transfer_is_that_of_the_export_and_goes_on_through_pruning(home, trained, tmp_path):
    moved = TransferOptions(load=str(trained), save=str(tmp_path / "m2"), target_tensor_parallel_size=2)
    transfer(moved, World())
    export(ExportOptions(load=str(tmp_path / "m2"), save=str(tmp_path / "hf2")), World())
    export(ExportOptions(load=str(trained), save=str(tmp_path / "hf")), World())
    one, two = state_dict(tmp_path / "hf"), state_dict(tmp_path / "hf2")
    assert all(torch.equal(value, two[name]) for name, value in one.items()) and set(one) == set(two)
    cut = PruneOptions(
        load=str(tmp_path / "m2"), save=str(tmp_path / "p"), ffn_hidden_size_remain=48, tensor_model_parallel_size=1
    )
    prune(cut, World())
    export(ExportOptions(load=str(tmp_path / "p"), save=str(tmp_path / "p-hf")), World())
    assert state_dict(tmp_path / "p-hf")["model.layers.0.mlp.down_proj.weight"].shape == (48, 48)


# --------------------------------------------------------------------------------------------------------------- going on


@pytest.mark.parametrize(
    "layout",
    [
        {},
        {"tensor_model_parallel_size": 2},
        {"tensor_model_parallel_size": 2, "sequence_parallel": True},
        {"pipeline_model_parallel_size": 2, "recompute_granularity": "full"},
        {"tensor_model_parallel_size": 1},
    ],
    ids=["one", "TP 2", "TP 2, sequence parallel", "PP 2, full recompute", "DP 2"],
)
def test_a_stopped_run_with_dropout_goes_on_to_the_same_losses(home, trained, ranks, tmp_path, layout):
    """A replica of a parameter that drifted from the one that is saved would show after it is loaded."""
    start = lambda save, events=None: (
        ranks(2).run(jobs.recover, options(home, save, lora_dropout=0.3, **layout), events, 1)
        if layout
        else [jobs.recover(World(), options(home, save, lora_dropout=0.3), events)]
    )
    assert set(start(tmp_path / "whole")) == {0}
    assert set(start(tmp_path / "run", {3: "asked"})) == {143}
    assert set(start(tmp_path / "run")) == {0}
    whole, found = jobs.course(tmp_path / "whole"), jobs.course(tmp_path / "run")
    assert whole.items() <= found.items() and len(whole) == 6 + 4
    without = jobs.course(trained)
    assert whole[0, "held_out_loss"] == pytest.approx(without[0, "held_out_loss"], rel=1e-6)  # B is zero: nothing to drop yet
    assert abs(whole[6, "held_out_loss"] - without[6, "held_out_loss"]) > 1e-4


TP, PP = "tensor_model_parallel_size", "pipeline_model_parallel_size"


@pytest.mark.parametrize(
    "model, courses",
    [
        ("m", [(2, {TP: 2, "sequence_parallel": True}), (2, {PP: 2}), (3, {TP: 3})]),
        ("grouped", [(4, {TP: 4}), (2, {TP: 2}), (4, {TP: 4, "sequence_parallel": True})]),  # shared by two ranks, whole, shared
    ],
)
def test_a_run_goes_on_at_any_other_layout(home, trained, ranks, tmp_path, model, courses):
    save, load = tmp_path / "run", str(home / model)
    for number, (size, changes) in enumerate(courses):
        events = {2 * number + 1: "asked"}
        assert set(ranks(size).run(jobs.recover, options(home, save, load=load, **changes), events, size - 1)) == {143}
    assert jobs.recover(World(), options(home, save, load=load, tensor_model_parallel_size=1)) == 0
    whole = trained if model == "m" else tmp_path / "whole"
    assert whole == trained or jobs.recover(World(), options(home, whole, load=load)) == 0
    found, wanted = jobs.course(save), jobs.course(whole)
    for key, loss in found.items():
        assert key not in wanted or loss == pytest.approx(wanted[key], rel=2e-5), key  # six updates, sums in another order
    assert found.keys() >= {(number, "loss") for number in range(1, 7)} | {(6, "held_out_loss")}


# ------------------------------------------------------------------------------------------------------------- bad input


def test_a_model_that_moved_is_named_and_another_is_refused(home, tiny, tmp_path):
    source = tiny("llama", dtype="float32", num_hidden_layers=2)
    convert(ConvertOptions(load=str(source), save=str(tmp_path / "m")), World())
    assert jobs.recover(World(), options(home, tmp_path / "run", load=str(tmp_path / "m"), train_iters=2)) == 0
    (tmp_path / "m").rename(tmp_path / "elsewhere")
    wanted = {"load": str(tmp_path / "run"), "save": str(tmp_path / "hf")}
    with pytest.raises(CheckpointError, match="(?s)the model that the adapter.*--base"):
        export(ExportOptions(**wanted), World())
    with pytest.raises(CheckpointError, match="(?s)other is not the model that the adapter.*--base"):
        export(ExportOptions(**wanted, base=str(home / "other")), World())
    with pytest.raises(CheckpointError, match="(?s)other is not the model"):
        transfer(TransferOptions(**wanted, base=str(home / "other")), World())
    assert not (tmp_path / "hf").exists()
    export(ExportOptions(**wanted, base=str(tmp_path / "elsewhere")), World())
    assert (tmp_path / "hf" / "model.safetensors").is_file()


def test_what_is_no_adapter_is_not_written_as_one(home, tmp_path):
    with pytest.raises(InputError, match="--adapter-only.*m is no adapter"):
        export(ExportOptions(load=str(home / "m"), save=str(tmp_path / "peft"), adapter_only=True), World())
    assert not (tmp_path / "peft").exists()


def test_a_step_that_needs_a_model_says_how_to_make_one_of_an_adapter(trained, tmp_path):
    with pytest.raises(InputError, match="(?s)merge it into its model with megatron-prune transfer"):
        prune(PruneOptions(load=str(trained), save=str(tmp_path / "p"), ffn_hidden_size_remain=48), World())
