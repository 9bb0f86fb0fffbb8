"""What a run takes, of models whose layers differ: the fullest stage decides."""

from __future__ import annotations

import dataclasses

import pytest
from dense import SMALL

from megatron_prune.arch.sharding import ParallelLayout
from megatron_prune.planning.resources import Training, activation_bytes

RUN = Training(seq_length=10, micro_batch_size=2, mixed_precision=True, sequence_parallel=False)
ATTENTION = 2 * 20 + 24 + 12 + 12 + 24
"""Features of a token that SMALL's attention keeps: the stream before and after its norm, q, k, v, and what o reads."""


@pytest.mark.parametrize(
    "ffn, features, in_flight, logits",
    [
        ((24, 24, 24, 24), 2 * (ATTENTION + 2 * 20 + 3 * 24), 2, False),  # the first: twice as many micro-batches
        ((0, 0, 24, 400), 2 * ATTENTION + 4 * 20 + 3 * 424, 1, True),  # the last: wider, and the logits
    ],
)
def test_activations_are_those_of_the_fullest_stage(ffn, features, in_flight, logits):
    config, layout = dataclasses.replace(SMALL, ffn_hidden_size=ffn), ParallelLayout(pipeline=2, vocab_divisible_by=1)
    tokens = 10 * 2
    expected = tokens * 2 * features * in_flight + (2 * 4 * tokens * SMALL.vocab_size if logits else 0)
    assert activation_bytes(config, layout, RUN) == expected
