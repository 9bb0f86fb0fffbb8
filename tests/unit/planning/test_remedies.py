"""What would fit: every change that is named does, and nothing smaller."""

from __future__ import annotations

from dataclasses import replace

import pytest
from dense import LARGE

from megatron_prune.arch.sharding import ParallelLayout
from megatron_prune.planning.needs import STEPS, Setup
from megatron_prune.planning.remedies import remedy
from megatron_prune.planning.resources import Training

EIGHT = ParallelLayout(tensor=8)
STEP = {step.name: step for step in STEPS}


def setup(**given) -> Setup:
    run = Training(seq_length=4096, mixed_precision=True)
    return Setup(config=LARGE, target=replace(LARGE, num_layers=60), layout=EIGHT, samples=256, run=run, **given)


def test_a_recovery_that_is_too_large_is_spread_over_more_devices():
    step, small = STEP["recovery"], setup()
    assert step.memory(small).device > 80e9
    said = remedy(step, small, int(80e9))
    assert said == "--target-tensor-parallel-size 16, --sequence-parallel"
    layout = ParallelLayout(tensor=16)
    fits = lambda **run: step.memory(replace(small, layout=layout, run=replace(small.run, **run))).device <= 80e9
    assert fits(sequence_parallel=True) and not fits()
    least = ("full", "uniform", 1)
    recomputed = dict(zip(("recompute_granularity", "recompute_method", "recompute_num_layers"), least))
    run = replace(small.run, sequence_parallel=True, **recomputed)
    assert step.memory(replace(small, run=run)).device > 80e9  # no flag alone does


def test_a_flag_that_takes_no_device_comes_before_more_of_them():
    step, small = STEP["recovery"], setup()
    limit = step.memory(replace(small, run=replace(small.run, sequence_parallel=True))).device
    assert remedy(step, small, limit) == "--sequence-parallel"


def test_passes_over_text_are_spread_too_and_what_nothing_helps_has_none():
    step, small = STEP["sampling text"], setup()
    assert step.memory(small).device > 30e9
    assert remedy(step, small, int(30e9)) in ("--dtype bf16", "--sample-length 256")
    assert remedy(step, small, 1 << 20) is None


@pytest.mark.parametrize("name", ["scoring by gradients", "re-fitting", "measuring"])
def test_what_fits_needs_nothing(name):
    assert STEP[name].memory(setup()).device < 80e9
