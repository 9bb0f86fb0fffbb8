"""What passes over text take, of a model too large to run here: it fits in what clusters have, and grows as it must."""

from __future__ import annotations

import dataclasses

import pytest
from dense import LARGE

from megatron_prune.arch.sharding import ParallelLayout
from megatron_prune.planning.needs import STEPS, Setup
from megatron_prune.planning.passes import Text, measuring_memory, refit_memory
from megatron_prune.planning.resources import Training, activation_bytes, trained_parameters, training_memory

EIGHT = ParallelLayout(tensor=8)
CUTS = {
    "nothing": {},
    "layers": {"num_layers": 60},
    "ffn": {"ffn_hidden_size": 20480},
    "a little of ffn": {"ffn_hidden_size": 28600},
    "hidden": {"hidden_size": 6144},
    "a little of hidden": {"hidden_size": 8064},
    "heads": {"num_attention_heads": 32},
    "groups": {"num_attention_heads": 32, "num_query_groups": 4},
    "layers and ffn": {"num_layers": 64, "ffn_hidden_size": 26144},
    "hidden and ffn": {"hidden_size": 7168, "ffn_hidden_size": 24576},
    "a little of all": {"num_layers": 79, "hidden_size": 8064, "ffn_hidden_size": 28600, "num_attention_heads": 56},
}


@pytest.mark.parametrize("cut", CUTS)
def test_every_pass_over_text_of_a_70b_model_fits_in_80_gb_at_tp_8(cut):
    """256 samples of 512 tokens, on one host of eight devices, whose memory is 1 TB at least."""
    setup = Setup(config=LARGE, target=dataclasses.replace(LARGE, **CUTS[cut]), layout=EIGHT, samples=256)
    for step in STEPS:
        if step.name != "recovery":
            memory = step.memory(setup)
            assert memory.device < 80e9, (step.name, memory)
            assert memory.together(8) < 0.3e12, (step.name, memory)


def test_refitting_holds_on_the_host_what_must_be_there():
    """Streams of all tokens on every rank; on the first one the second moments of both halves of the samples."""
    target, text = dataclasses.replace(LARGE, ffn_hidden_size=20480), Text(samples=256, seq_length=512)
    memory = refit_memory(LARGE, target, EIGHT, text)
    streams = 2 * 4 * 256 * 512 * 8192 + 4 * 256 * 512 * 20480 // 8
    folds = 2 * 8 * 20480 * (20480 + 8192)
    assert streams < memory.others < memory.first and memory.first > streams + folds
    assert memory.device > 8 * 2 * 20480**2  # a second moment and its factor
    more = refit_memory(LARGE, target, EIGHT, Text(samples=512, seq_length=512))
    assert more.first - memory.first == more.others - memory.others == streams and more.device == memory.device
    assert refit_memory(LARGE, target, EIGHT, Text(samples=512, seq_length=512, copies=2)) == memory


def test_without_an_accelerator_all_is_one_memory():
    target, text = dataclasses.replace(LARGE, ffn_hidden_size=20480), Text(samples=256, seq_length=512)
    for ranks in (1, 8):
        memory = refit_memory(LARGE, target, ParallelLayout(tensor=ranks), text)
        assert max(memory.first, memory.device) < memory.alone < memory.first + memory.device


def test_second_moments_of_a_layer_are_shared_and_then_whole_on_the_first_process():
    text = Text(samples=8, seq_length=512)
    without = measuring_memory(LARGE, EIGHT, text, [], rows=False)
    with_them = measuring_memory(LARGE, EIGHT, text, [28672], rows=False)
    assert with_them.device - without.device == 8 * 28672**2 // 8
    assert with_them.first >= without.first + 8 * 28672**2


def test_adapters_are_all_that_lora_trains():
    run = Training(lora_r=8)
    columns, rows = 8192 * 3 + 2 * 8192, (8192 + 2 * 1024 + 2 * 28672) // 8  # read by q, k, v, gate and up; written by them
    writers = 2 * 8192 + (8192 + 28672) // 8
    assert trained_parameters(LARGE, EIGHT, run) == 80 * 8 * (columns + rows + writers)
    parts, whole = training_memory(LARGE, EIGHT, run), training_memory(LARGE, EIGHT, Training())
    assert parts["weights"] == whole["weights"] and parts["activations"] == whole["activations"]
    assert parts["gradients"] == 4 * trained_parameters(LARGE, EIGHT, run) < whole["gradients"] / 100


def test_a_step_of_a_recovery_keeps_what_recover_would_keep():
    """The flags of recover, by hand: features of a token."""
    config = dataclasses.replace(LARGE, num_layers=4)
    stream, inside = 8192, 2 * 64 * 128 + 2 * 8 * 128 + 3 * 28672
    logits = 2 * 4 * 129024 // 8 * 1000  # of a vocabulary padded to a multiple of 1024
    kept = lambda **given: (activation_bytes(config, EIGHT, Training(seq_length=1000, **given)) - logits) / 2000
    whole = 4 * stream + inside / 8
    assert kept() == 4 * whole == kept(recompute_granularity="selective")
    assert kept(sequence_parallel=True) == 4 * (4 * stream + inside) / 8
    assert kept(recompute_granularity="full", recompute_num_layers=1) == 4 * stream + whole
    assert kept(recompute_granularity="full", recompute_method="uniform", recompute_num_layers=2) == 2 * stream + 2 * whole
    assert kept(recompute_granularity="full", recompute_method="block", recompute_num_layers=3) == 3 * stream + whole + whole
