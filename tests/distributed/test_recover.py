"""Recovery under TP × PP × DP against transformers and torch's AdamW in one process (``tests/recovery_reference.py``).

Both compute in float32 and differ in the order of sums: 1e-7 to 3e-7 of a loss and of a gradient's norm over all steps, and
3e-5 of what training adds to a matrix, since Adam divides small gradients by their own size. What could be wrong is far
larger: a norm that misses a shard changes by 1e-2, weight decay on the norms changes an update by 1e-1, a missing sum over
ranks by 1. ``LOSS`` and ``UPDATE`` leave a factor of ten to the first.
"""

from __future__ import annotations

import dataclasses
import functools
import json
from pathlib import Path
from typing import Any

import numpy
import per_layer
import pytest
import rank_jobs_recovery as jobs
import recovery_reference as reference
import torch
from safetensors.torch import load_file
from tiny import state_dict

from megatron_prune.arch.adapter import AdapterConfig
from megatron_prune.families.family import FAMILIES
from megatron_prune.recovery.lora import first_a
from megatron_prune.runtime.world import World
from megatron_prune.steps.convert import ConvertOptions, convert
from megatron_prune.steps.export import ExportOptions, export
from megatron_prune.steps.prune import PruneOptions, prune

LENGTH, BATCH, STEPS, HELD_OUT = 18, 6, 4, 2
SEED, SPLIT = 77, "60,30,10"
LOSS, UPDATE = 3e-6, 3e-4
"""Relative."""
ADAM = {"adam_beta1": 0.8, "adam_beta2": 0.9, "adam_eps": 1e-5, "weight_decay": 0.5, "clip_grad": 1.0}
RATES = {"lr": 4e-3, "min_lr": 1e-3, "lr_warmup_iters": 2, "lr_decay_iters": 5}


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> str:
    return reference.write_pair(tmp_path_factory.mktemp("data") / "text", reference.documents(40))


@pytest.fixture(scope="module")
def drawn(data) -> tuple[list[torch.Tensor], torch.Tensor]:
    """The batches of the steps, and the held-out samples, [samples, LENGTH + 1]."""
    counts = (STEPS * BATCH, HELD_OUT * BATCH, HELD_OUT * BATCH)
    train, valid, _ = reference.samples(([data], None), SPLIT, seq_length=LENGTH, seed=SEED, counts=counts)
    return list(train.split(BATCH)), valid


@pytest.fixture(scope="module")
def checkpoints(tiny, tmp_path_factory):
    """``checkpoints(family, changes)`` → (Hugging Face directory, Megatron checkpoint of TP 1) in float32.

    With ``", by layer"`` behind a family's name: of layers that differ, some of which lack a block (``tests/per_layer.py``).
    """
    made: dict[tuple, tuple[Path, str]] = {}

    def get(family: str, changes: dict[str, Any]) -> tuple[Path, str]:
        key = (family, repr(changes))
        if key not in made:
            save = tmp_path_factory.mktemp("model") / "m"
            name = family.removesuffix(", by layer")
            source = tiny(name, dtype="float32", **changes)
            if name != family:
                config = dataclasses.replace(per_layer.mixed(name), **changes)
                family_of, beside = FAMILIES.get(name), source
                source = per_layer.write_model(save.with_name("hf"), config, family_of, beside=beside, dtype=torch.float32)
            convert(ConvertOptions(load=str(source), save=str(save)), World())
            made[key] = source, str(save)
        return made[key]

    return get


def run(ranks, layout: tuple[int, int, int], load: str, save: Path, data: str, **options) -> list[dict[str, Any]]:
    """Recover from ``load`` at (TP, PP, DP) → the records of ``history.jsonl``."""
    tp, pp, dp = layout
    common = {"train_iters": STEPS, "data_path": (data,), "split": SPLIT, "seq_length": LENGTH, "seed": SEED}
    common |= {"global_batch_size": BATCH, "eval_iters": HELD_OUT, "save_interval": 100, "log_interval": 1, **ADAM, **RATES}
    common |= {"tensor_model_parallel_size": tp, "pipeline_model_parallel_size": pp}
    chosen = {**common, "load": load, "save": str(save), **options}
    if options.get("lr_decay_style") == "constant":
        del chosen["min_lr"], chosen["lr_decay_iters"]
    size = tp * pp * dp
    codes = ranks(size).run(jobs.recover, chosen) if size > 1 else [jobs.recover(World(), chosen)]
    assert codes == [0] * size
    return [json.loads(line) for line in (save / "history.jsonl").read_text().splitlines()]


def dense(
    source: Path, batches: list[torch.Tensor], style: str = "cosine", lr: float = RATES["lr"], **further
) -> reference.Course:
    schedule = reference.Schedule(lr=lr, min_lr=RATES["min_lr"], style=style, warmup=2, decay=5)
    betas = (ADAM["adam_beta1"], ADAM["adam_beta2"])
    settings = {"betas": betas, "eps": ADAM["adam_eps"], "weight_decay": ADAM["weight_decay"], "clip": ADAM["clip_grad"]}
    return reference.train(source, batches, schedule, **{**settings, **further})


def check_course(records: list[dict[str, Any]], wanted: reference.Course) -> None:
    """Losses, norms and rates of every step."""
    steps = [record for record in records if "loss" in record]
    assert [record["iteration"] for record in steps] == list(range(1, STEPS + 1))
    assert [record["tokens"] for record in steps] == [number * BATCH * LENGTH for number in range(1, STEPS + 1)]
    assert [record["loss"] for record in steps] == pytest.approx(wanted.losses, rel=LOSS)
    assert [record["grad_norm"] for record in steps] == pytest.approx(wanted.norms, rel=LOSS)
    assert [record["lr"] for record in steps] == pytest.approx(wanted.rates, rel=1e-9)
    assert [record["steps_left_out"] for record in steps] == [0] * STEPS
    if any(wanted.divergences):
        assert [record["cross_entropy"] for record in steps] == pytest.approx(wanted.cross_entropies, rel=LOSS)
        assert [record["kl"] for record in steps] == pytest.approx(wanted.divergences, rel=10 * LOSS)  # a difference
    if any(wanted.unlike):
        assert [record["hidden"] for record in steps] == pytest.approx(wanted.unlike, rel=10 * LOSS)


def check_weights(save: Path, source: Path, wanted: reference.Course, hf: Path) -> None:
    """What training added to every tensor, as it is exported to ``hf``."""
    export(ExportOptions(load=str(save), save=str(hf)), World())
    before, after = state_dict(source), state_dict(hf)
    expected = dict(wanted.model.named_parameters())
    assert set(before) == set(after) == set(expected)
    for name, old in before.items():
        update, found = expected[name].detach() - old, after[name] - old
        assert update.norm() > 1e-3 * old.norm(), f"{name} was hardly trained: nothing to compare"
        assert (found - update).norm() < UPDATE * update.norm(), name


CASES = {
    "qwen3, layers that differ": ("qwen3, by layer", {}, (1, 1, 1), {"micro_batch_size": 2}),
    "qwen3, layers that differ, TP 2 PP 2 sequence parallel": (
        "qwen3, by layer",
        {},
        (2, 2, 1),
        {"micro_batch_size": 3, "sequence_parallel": True},
    ),
    "gemma3, layers that differ, PP 2 DP 2, full recompute": (
        "gemma3_text, by layer",
        {},
        (1, 2, 2),
        {"micro_batch_size": 3, "recompute_granularity": "full"},
    ),
    "gemma3, TP 2 PP 2 sequence parallel": (
        "gemma3_text",
        {},
        (2, 2, 1),
        {"micro_batch_size": 3, "sequence_parallel": True},
    ),
    "llama, untied": ("llama", {}, (1, 1, 1), {"micro_batch_size": 2}),
    "llama, tied, TP 3 sequence parallel": (
        "llama",
        {"tie_word_embeddings": True},
        (3, 1, 1),
        {"micro_batch_size": 2, "sequence_parallel": True},
    ),
    "llama, tied, PP 2": ("llama", {"tie_word_embeddings": True}, (1, 2, 1), {"micro_batch_size": 2}),
    "mistral, window of 7, DP 2": ("mistral", {"sliding_window": 7}, (1, 1, 2), {}),
    "mistral, window of 7, TP 2 DP 2, selective recompute": (
        "mistral",
        {"sliding_window": 7},
        (2, 1, 2),
        {"micro_batch_size": 3, "recompute_granularity": "selective"},
    ),
    "qwen2, tied, PP 2 DP 2": ("qwen2", {"tie_word_embeddings": True}, (1, 2, 2), {}),
    "qwen2, tied, TP 2 PP 2 sequence parallel, full recompute": (
        "qwen2",
        {"tie_word_embeddings": True},
        (2, 2, 1),
        {"micro_batch_size": 3, "sequence_parallel": True, "recompute_granularity": "full"},
    ),
    "qwen2, untied, PP 2, block recompute": (
        "qwen2",
        {},
        (1, 2, 1),
        {"micro_batch_size": 2, "recompute_granularity": "full", "recompute_method": "block", "recompute_num_layers": 1},
    ),
    "qwen3, wide heads, TP 2": ("qwen3", {"head_dim": 16}, (2, 1, 1), {"micro_batch_size": 3}),
    "qwen3, wide heads, TP 3 sequence parallel": (
        "qwen3",
        {"head_dim": 16},
        (3, 1, 1),
        {"micro_batch_size": 3, "sequence_parallel": True},
    ),
    "qwen3, 2 KV groups, TP 4": ("qwen3", {"num_key_value_heads": 2}, (4, 1, 1), {"micro_batch_size": 6}),
}


@pytest.fixture(scope="module")
def plain(drawn):
    """``plain(source)`` → (the course of one plain process, held-out losses before and after it), once per model."""

    def get(source: Path) -> tuple[reference.Course, list[float]]:
        batches, valid = drawn
        course = dense(source, batches)
        return course, [reference.cross_entropy(model, valid) for model in (reference.load(source), course.model)]

    return functools.cache(get)


@pytest.mark.parametrize("name", CASES)
def test_held_out_loss_losses_norms_and_weights_are_those_of_one_plain_process(ranks, checkpoints, data, plain, tmp_path, name):
    family, changes, layout, options = CASES[name]
    source, load = checkpoints(family, changes)
    records = run(ranks, layout, load, tmp_path / "run", data, **options)
    wanted, ends = plain(source)
    check_course(records, wanted)
    held_out = [record["held_out_loss"] for record in records if "held_out_loss" in record]
    assert held_out == pytest.approx(ends, rel=LOSS)
    assert len(held_out) == 2 and held_out[1] < held_out[0] - 0.02
    check_weights(tmp_path / "run", source, wanted, tmp_path / "hf")


@pytest.mark.parametrize("style", ["linear", "constant", "inverse-square-root"])
def test_every_decay_of_the_learning_rate_without_clipping(ranks, checkpoints, data, drawn, tmp_path, style):
    source, load = checkpoints("llama", {})
    options = {"lr_decay_style": style, "clip_grad": 0.0, "micro_batch_size": 6}
    records = run(ranks, (1, 1, 1), load, tmp_path / "run", data, **options)
    wanted = dense(source, drawn[0], style, clip=0.0)
    assert min(wanted.norms) > 2  # it would have been clipped
    check_course(records, wanted)
    check_weights(tmp_path / "run", source, wanted, tmp_path / "hf")


@pytest.mark.parametrize(
    "layout, weight, temperature, options",
    [
        ((1, 1, 1), 0.3, 2.0, {"micro_batch_size": 3}),
        ((2, 1, 1), 1.0, 1.0, {"micro_batch_size": 6, "sequence_parallel": True}),
        ((1, 2, 1), 0.3, 2.0, {"micro_batch_size": 2}),
        ((1, 1, 2), 1.0, 2.0, {"micro_batch_size": 3}),
        ((2, 2, 1), 0.6, 1.0, {"micro_batch_size": 2}),
    ],
)
def test_distillation_from_a_running_teacher(ranks, checkpoints, data, drawn, tmp_path, layout, weight, temperature, options):
    source, load = checkpoints("qwen2", {"tie_word_embeddings": True})
    teacher, taught = checkpoints("llama", {"num_hidden_layers": 2, "intermediate_size": 132, "seed": 5})
    how = {"weight": weight, "temperature": temperature}
    options = {**options, "teacher": taught, "distill_weight": weight, "distill_temperature": temperature}
    records = run(ranks, layout, load, tmp_path / "run", data, **options)
    wanted = dense(source, drawn[0], teacher=teacher, **how)
    check_course(records, wanted)
    assert min(wanted.divergences) > 0.1
    held_out = [record["held_out_loss"] for record in records if "held_out_loss" in record]
    assert held_out[0] == pytest.approx(reference.cross_entropy(reference.load(source), drawn[1]), rel=LOSS)
    check_weights(tmp_path / "run", source, wanted, tmp_path / "hf")


def test_a_model_whose_layers_differ_learns_from_one_whose_are_alike(ranks, checkpoints, data, drawn, tmp_path):
    source, load = checkpoints("qwen3, by layer", {})
    teacher, taught = checkpoints("llama", {"num_hidden_layers": 2, "intermediate_size": 132, "seed": 5})
    options = {"teacher": taught, "distill_weight": 0.6, "distill_temperature": 2.0, "micro_batch_size": 2}
    records = run(ranks, (2, 2, 1), load, tmp_path / "run", data, **options)
    wanted = dense(source, drawn[0], teacher=teacher, weight=0.6, temperature=2.0)
    check_course(records, wanted)
    check_weights(tmp_path / "run", source, wanted, tmp_path / "hf")


TEACHER = {"num_hidden_layers": 2, "intermediate_size": 132, "seed": 5}


@pytest.mark.parametrize(
    "teach_at, learn_at, listed, temperature, options",
    [
        ((1, 1, 1), (1, 2, 1), 20, 2.0, {}),
        ((2, 2, 1), (2, 1, 1), 307, 1.0, {"sequence_parallel": True}),
        ((3, 1, 1), (1, 1, 2), 20, 1.0, {}),
        ((1, 1, 2), (1, 1, 1), 1, 2.0, {}),
    ],
)
def test_distillation_from_what_a_teacher_left(
    ranks, checkpoints, data, drawn, tmp_path, teach_at, learn_at, listed, temperature, options
):
    source, load = checkpoints("qwen2", {"tie_word_embeddings": True})
    teacher, taught = checkpoints("llama", TEACHER)
    tp, pp, dp = teach_at
    lesson = {"load": taught, "save": str(tmp_path / "taught"), "train_iters": STEPS, "global_batch_size": BATCH, "seed": SEED}
    lesson |= {"data_path": (data,), "split": SPLIT, "seq_length": LENGTH, "eval_iters": HELD_OUT, "top_k": listed}
    lesson |= {"tensor_model_parallel_size": tp, "pipeline_model_parallel_size": pp, "micro_batch_size": 5}
    lesson |= {"distill_temperature": temperature}
    ranks(tp * pp * dp).run(jobs.teach, lesson) if tp * pp * dp > 1 else jobs.teach(World(), lesson)
    how = {"distill_weight": 0.4, "distill_temperature": temperature, "teacher_logits": str(tmp_path / "taught")}
    records = run(ranks, learn_at, load, tmp_path / "run", data, micro_batch_size=3, **how, **options)
    further = {"teacher": teacher, "weight": 0.4, "temperature": temperature}
    wanted = dense(source, drawn[0], listed=listed, **further)
    check_course(records, wanted)
    check_weights(tmp_path / "run", source, wanted, tmp_path / "hf")
    whole = dense(source, drawn[0], **further)
    if listed == 307:  # what float16 leaves of a log-probability
        assert wanted.divergences == pytest.approx(whole.divergences, rel=1e-3)
    else:
        assert wanted.divergences[0] < 0.99 * whole.divergences[0]


@pytest.mark.parametrize(
    "layout, weight, chosen, pairs, options",
    [
        ((1, 1, 1), 0.0, (), ((0, 2), (1, 3)), {"micro_batch_size": 2}),
        ((2, 1, 1), 0.5, (1,), ((1, 3),), {"micro_batch_size": 3, "sequence_parallel": True}),
        ((3, 1, 1), 0.5, (1, 0), ((1, 3), (0, 2)), {"micro_batch_size": 6}),
        ((2, 1, 2), 0.0, (0,), ((0, 2),), {"micro_batch_size": 1, "recompute_granularity": "selective"}),
    ],
)
def test_layers_are_compared_with_those_of_the_teacher(
    ranks, checkpoints, data, drawn, tmp_path, layout, weight, chosen, pairs, options
):
    teacher, taught = checkpoints("llama", {"seed": 5})
    cut = PruneOptions(load=taught, save=str(tmp_path / "p"), drop_layers=(1, 2), hidden_size_remain=36, metric="random")
    prune(cut, World())
    export(ExportOptions(load=str(tmp_path / "p"), save=str(tmp_path / "p-hf")), World())
    options = {**options, "teacher": taught, "distill_weight": weight, "hidden_weight": 0.7, "hidden_layers": chosen}
    records = run(ranks, layout, str(tmp_path / "p"), tmp_path / "run", data, **options)
    wanted = dense(tmp_path / "p-hf", drawn[0], teacher=teacher, weight=weight, layers=pairs, hidden_weight=0.7)
    check_course(records, wanted)
    assert min(wanted.unlike) > 0.05
    check_weights(tmp_path / "run", tmp_path / "p-hf", wanted, tmp_path / "hf")


@pytest.mark.parametrize(
    "layout, options",
    [((1, 1, 1), {"micro_batch_size": 2}), ((2, 1, 1), {"micro_batch_size": 3, "sequence_parallel": True})],
)
def test_layers_that_lost_a_block_are_compared_with_whole_ones(ranks, checkpoints, data, drawn, tmp_path, layout, options):
    """Also where a layer is gone: that before it stands for both."""
    teacher, taught = checkpoints("qwen3", {"seed": 5})
    cut = PruneOptions(
        load=taught, save=str(tmp_path / "p"), drop_attention=(0,), drop_mlp=(3,), drop_layers=(1,), metric="magnitude"
    )
    prune(cut, World())
    export(ExportOptions(load=str(tmp_path / "p"), save=str(tmp_path / "p-hf")), World())
    options = {**options, "teacher": taught, "distill_weight": 0.5, "hidden_weight": 0.7, "hidden_layers": (0, 2)}
    records = run(ranks, layout, str(tmp_path / "p"), tmp_path / "run", data, **options)
    wanted = dense(tmp_path / "p-hf", drawn[0], teacher=teacher, weight=0.5, layers=((0, 1), (2, 3)), hidden_weight=0.7)
    check_course(records, wanted)
    assert min(wanted.unlike) > 0.01
    check_weights(tmp_path / "run", tmp_path / "p-hf", wanted, tmp_path / "hf")


ROLES = {"q_proj": "q", "k_proj": "k", "v_proj": "v", "o_proj": "o", "gate_proj": "gate", "up_proj": "up", "down_proj": "down"}


def adapted(source: Path, modules: tuple[str, ...]) -> torch.nn.Module:
    """The model as peft adapts it, beginning where our adapters do."""
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(r=4, lora_alpha=10.0, target_modules=list(modules), task_type="CAUSAL_LM")
    model = get_peft_model(reference.load(source), config)
    lora = AdapterConfig(r=4, alpha=10.0, dropout=0.0, roles=tuple(ROLES[name] for name in modules), seed=SEED)
    with torch.no_grad():
        for number, layer in enumerate(model.base_model.model.model.layers):
            for name in modules:
                block = layer.mlp if ROLES[name] in ("gate", "up", "down") else layer.self_attn
                if not hasattr(block, name):
                    continue  # the layer has no such block
                matrix = block.get_submodule(name)
                a, b = matrix.lora_A["default"].weight, matrix.lora_B["default"].weight
                a.copy_(first_a(ROLES[name], number, lora, a.shape[1]))
                assert not b.any()
    return model


@pytest.mark.parametrize(
    "layout, family, targets, modules, options",
    [
        ((1, 1, 1), "llama", None, tuple(ROLES), {"micro_batch_size": 2}),
        ((3, 1, 1), "qwen2", None, tuple(ROLES), {"micro_batch_size": 6, "sequence_parallel": True}),
        ((2, 1, 2), "qwen3", ("q_proj", "v_proj", "up_proj"), ("q_proj", "v_proj", "up_proj"), {"micro_batch_size": 3}),
        (
            (2, 2, 1),
            "qwen2",
            ("linear_qkv", "linear_fc2"),
            ("q_proj", "k_proj", "v_proj", "down_proj"),
            {"micro_batch_size": 2, "sequence_parallel": True, "recompute_granularity": "full"},
        ),
        ((2, 2, 1), "qwen3, by layer", None, tuple(ROLES), {"micro_batch_size": 3}),
        ((1, 1, 1), "gemma3_text", None, tuple(ROLES), {"micro_batch_size": 2}),
        ((2, 1, 1), "gemma3_text", None, tuple(ROLES), {"micro_batch_size": 6, "sequence_parallel": True}),
        ((4, 1, 1), "llama, 2", None, tuple(ROLES), {"micro_batch_size": 6}),
        (
            (2, 1, 1),
            "qwen2, 1",
            ("q_proj", "v_proj"),
            ("q_proj", "v_proj"),
            {"micro_batch_size": 3, "sequence_parallel": True},
        ),
        ((2, 1, 1), "llama, 1", ("v_proj",), ("v_proj",), {"micro_batch_size": 6}),
        ((1, 2, 1), "llama", ("o_proj",), ("o_proj",), {"micro_batch_size": 3, "recompute_granularity": "full"}),
        ((1, 1, 1), "qwen2", ("k_proj",), ("k_proj",), {"micro_batch_size": 6, "teacher": True}),
    ],
)
def test_adapters_train_as_those_of_peft(ranks, checkpoints, data, drawn, tmp_path, layout, family, targets, modules, options):
    name, _, groups = family.partition(", ")
    named = (name, {"num_key_value_heads": int(groups)}) if groups.isdecimal() else (family, {})
    source, load = checkpoints(*named)
    further = {}
    if "teacher" in options:
        teacher, taught = checkpoints("llama", TEACHER)
        options, further = {**options, "teacher": taught, "distill_weight": 0.5}, {"teacher": teacher, "weight": 0.5}
    chosen = {"lora_r": 4, "lora_alpha": 10.0, "lr": 2e-2, **({"lora_targets": targets} if targets else {})}
    records = run(ranks, layout, load, tmp_path / "run", data, **chosen, **options)
    wanted = dense(source, drawn[0], lr=2e-2, model=adapted(source, modules), **further)
    check_course(records, wanted)
    held_out = [record["held_out_loss"] for record in records if "held_out_loss" in record]
    assert held_out[1] == pytest.approx(reference.cross_entropy(wanted.model, drawn[1]), rel=LOSS)
    assert abs(held_out[1] - held_out[0]) > 1e-3
    export(ExportOptions(load=str(tmp_path / "run"), save=str(tmp_path / "peft"), adapter_only=True), World())
    found = load_file(tmp_path / "peft" / "adapter_model.safetensors")
    expected = {name.replace(".default", ""): value for name, value in wanted.model.named_parameters() if value.requires_grad}
    assert set(found) == set(expected)
    begun = dict(adapted(source, modules).named_parameters())
    for name, value in found.items():
        update = expected[name] - begun[name.replace(".weight", ".default.weight")]
        assert update.norm() > 0.02
        assert (value - expected[name]).norm() < UPDATE * update.norm(), name


@pytest.mark.parametrize("precision, layout", [("bf16", (1, 1, 1)), ("bf16", (2, 1, 1)), ("fp16", (1, 2, 1))])
def test_16_bits_come_near_to_float32(ranks, checkpoints, data, plain, tmp_path, precision, layout):
    """bf16 has steps of 4e-3, fp16 of 5e-4; errors of single products average out, and a loss is off by 1e-3."""
    source, load = checkpoints("qwen3", {"head_dim": 16})
    options = {precision: True, "micro_batch_size": 3, **({"initial_loss_scale": 2.0**12} if precision == "fp16" else {})}
    records = run(ranks, layout, load, tmp_path / "run", data, **options)
    wanted, _ = plain(source)
    steps = [record for record in records if "loss" in record]
    assert [record["loss"] for record in steps] == pytest.approx(wanted.losses, rel=2e-3)
    assert [record["loss"] for record in steps] != pytest.approx(wanted.losses, rel=LOSS)  # it did compute in 16 bits
    assert [record["grad_norm"] for record in steps] == pytest.approx(wanted.norms, rel=2e-2)
    assert [record["lr"] for record in steps] == pytest.approx(wanted.rates, rel=1e-9)
    export(ExportOptions(load=str(tmp_path / "run"), save=str(tmp_path / "hf")), World())
    before, after = state_dict(source), state_dict(tmp_path / "hf")
    for name, parameter in wanted.model.named_parameters():
        update, error = parameter.detach() - before[name], after[name] - parameter.detach()
        rounding = torch.finfo({"bf16": torch.bfloat16, "fp16": torch.float16}[precision]).eps / 2 * parameter.norm()
        assert error.norm() < 0.2 * update.norm() + rounding, name


@pytest.fixture(scope="module")
def marked(data) -> tuple[list[torch.Tensor], torch.Tensor]:
    """A mask beside the data, of which some documents have nothing; and what megatron-core itself draws of it (by the same
    indices, for it is as long): for the batches of the steps and for the held-out samples."""
    draw = torch.Generator().manual_seed(3)
    texts = [
        (torch.rand(len(text), generator=draw) < 0.2 * (number % 4)).long().tolist()
        for number, text in enumerate(reference.documents(40))
    ]
    mask = reference.write_pair(Path(f"{data}_mask"), texts, numpy.uint8)
    counts = (STEPS * BATCH, HELD_OUT * BATCH, HELD_OUT * BATCH)
    train, valid, _ = reference.samples(([mask], None), SPLIT, seq_length=LENGTH, seed=SEED, counts=counts)
    return list(train.split(BATCH)), valid


@pytest.mark.parametrize(
    "layout, taught, options",
    [
        ((1, 1, 1), False, {"micro_batch_size": 2}),
        ((2, 1, 2), False, {"micro_batch_size": 1}),
        ((1, 2, 1), True, {"micro_batch_size": 1}),
        ((2, 1, 1), True, {"micro_batch_size": 3, "sequence_parallel": True}),
    ],
)
def test_only_answers_count_in_every_loss(ranks, checkpoints, data, drawn, marked, tmp_path, layout, taught, options):
    source, load = checkpoints("llama", {})
    teacher, teacher_load = checkpoints("llama", {"seed": 5, "intermediate_size": 132}) if taught else (None, None)
    if taught:
        options = {**options, "teacher": teacher_load, "distill_weight": 0.6, "distill_temperature": 1.5}
    save = tmp_path / "run"
    records = run(ranks, layout, load, save, data, answers_only=True, **options)
    batches, counted = drawn[0], marked[0]
    assert min(int(row[1:].sum()) for each in counted for row in each) == 0 < min(int(each[:, 1:].sum()) for each in counted)
    further = {"teacher": teacher, "weight": 0.6, "temperature": 1.5} if taught else {}
    wanted = dense(source, batches, counted=counted, **further)
    check_course(records, wanted)
    check_weights(save, source, wanted, tmp_path / "hf")
    held_out = [record["held_out_loss"] for record in records if "held_out_loss" in record]
    ends = [reference.cross_entropy(model, drawn[1], marked[1]) for model in (reference.load(source), wanted.model)]
    assert [held_out[0], held_out[-1]] == pytest.approx(ends, rel=LOSS)
    plain = reference.cross_entropy(reference.load(source), drawn[1])
    assert abs(held_out[0] - plain) > 100 * LOSS * plain  # all tokens would be another loss
