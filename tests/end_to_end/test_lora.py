"""Adapters: trained at any layout, resumed to the bit, merged, and given to peft; beside transformers with peft."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import rank_jobs_recovery as jobs
import recovery_reference as reference
import torch

from megatron_prune.runtime.world import World
from megatron_prune.steps.convert import ConvertOptions, convert
from megatron_prune.steps.export import ExportOptions, export

LORA = {"lora_r": 4, "lora_alpha": 8.0, "lora_dropout": 0.0}


@pytest.fixture(scope="module")
def home(tmp_path_factory, tiny) -> Path:
    """A model in float32 as ``hf`` and ``m``, and a pair ``text``."""
    home = tmp_path_factory.mktemp("home")
    source = tiny("llama", dtype="float32", num_hidden_layers=2)
    convert(ConvertOptions(load_dir=str(source), save_dir=str(home / "m")), World())
    (home / "hf").symlink_to(source)
    reference.write_pair(home / "text", reference.documents(40))
    return home


def options(home: Path, save: Path, **changes) -> dict:
    common = {"load": str(home / "m"), "data_path": (str(home / "text"),), "split": "80,10,10", "seq_length": 16}
    common |= {"train_iters": 6, "global_batch_size": 6, "micro_batch_size": 3, "eval_iters": 1, "save_interval": 2}
    return {**common, "log_interval": 1, "lr": 3e-2, "min_lr": 1e-3, "lr_warmup_iters": 1, **LORA, "save": str(save), **changes}


def losses(save: Path) -> list[tuple[int, float]]:
    records = [json.loads(line) for line in (save / "history.jsonl").read_text().splitlines()]
    return [(record["iteration"], record.get("loss", record.get("held_out_loss"))) for record in records]


def test_merged_and_through_peft_an_adapter_is_one_model_and_the_base_stays(home, tmp_path):
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    assert jobs.recover(World(), options(home, tmp_path / "run")) == 0
    export(ExportOptions(load_dir=str(tmp_path / "run"), save_dir=str(tmp_path / "merged")), World())
    export(ExportOptions(load_dir=str(tmp_path / "run"), save_dir=str(tmp_path / "peft"), adapter_only=True), World())
    load = lambda folder: AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    tokens = torch.randint(2, 300, (2, 12), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        base, merged = load(home / "hf")(tokens).logits, load(tmp_path / "merged")(tokens).logits
        adapted = PeftModel.from_pretrained(load(home / "hf"), tmp_path / "peft").eval()(tokens).logits
    torch.testing.assert_close(merged, adapted, rtol=1e-4, atol=1e-5)
    assert (merged - base).abs().max() > 1e-2


def test_a_stopped_run_of_adapters_goes_on_to_the_same_losses(home, tmp_path):
    assert jobs.recover(World(), options(home, tmp_path / "whole")) == 0
    assert jobs.recover(World(), options(home, tmp_path / "run"), {2: "stop"}) == 143
    assert jobs.recover(World(), options(home, tmp_path / "run")) == 0
    whole, found = dict(losses(tmp_path / "whole")), dict(losses(tmp_path / "run"))
    assert whole.items() <= found.items()


def test_adapters_train_alike_under_tensor_parallelism(home, ranks, tmp_path):
    assert jobs.recover(World(), options(home, tmp_path / "one")) == 0
    ranks(2).run(jobs.recover, options(home, tmp_path / "two", tensor_model_parallel_size=2))
    one, two = losses(tmp_path / "one"), losses(tmp_path / "two")
    assert len(one) == len(two) > 6
    for (step, loss), (at, other) in zip(one, two):
        assert step == at and loss == pytest.approx(other, rel=2e-5)  # sums over ranks in another order, six updates
