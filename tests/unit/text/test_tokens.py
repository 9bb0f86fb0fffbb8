"""Samples: what is refused, what they digest to, how they spread over data-parallel copies."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from megatron_prune.errors import InputError
from megatron_prune.text.tokens import Calibration


def samples(count: int = 5, width: int = 6, **changes) -> Calibration:
    values = {
        "tokens": torch.arange(count * width).view(count, width),
        "lengths": torch.full((count,), width),
        "weights": torch.arange(1, count + 1).double(),
        "provenance": [{"name": "x"}],
    }
    return Calibration(**{**values, **changes})


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"tokens": torch.zeros(5, 6)}, "tokens.*float32.*int64"),
        ({"tokens": torch.zeros(5, dtype=torch.int64)}, "tokens.*samples, seq_length"),
        ({"lengths": torch.full((4,), 6)}, "lengths"),
        ({"lengths": torch.tensor([6, 6, 1, 6, 6])}, "1 to 6 tokens.*needed: 2 to 6"),
        ({"lengths": torch.tensor([6, 6, 7, 6, 6])}, "6 to 7 tokens"),
        ({"weights": torch.ones(5)}, "weights.*float32"),
        ({"weights": torch.tensor([1.0, 0, 1, 1, 1]).double()}, "positive"),
        ({"weights": torch.tensor([1.0, torch.nan, 1, 1, 1]).double()}, "positive"),
        ({"weights": torch.tensor([1.0, torch.inf, 1, 1, 1]).double()}, "positive"),
    ],
)
def test_what_is_no_sample_is_refused(changes, message):
    with pytest.raises(InputError, match="(?s)" + message):
        samples(**changes)


def test_the_digest_changes_with_every_part_and_with_nothing_else():
    one = samples()
    assert one.digest == samples(provenance=[]).digest
    tokens, lengths, weights = one.tokens.clone(), one.lengths.clone(), one.weights.clone()
    tokens[4, 5] += 1
    lengths[0] -= 1
    weights[2] *= 1 + 1e-15
    digests = {
        one.digest,
        *(samples(**{k: v}).digest for k, v in (("tokens", tokens), ("lengths", lengths), ("weights", weights))),
    }
    assert len(digests) == 4
    strided = torch.stack([one.tokens, one.tokens], dim=-1)[..., 0]
    assert samples(tokens=strided).digest == one.digest
    assert samples(4, 3).digest != samples(3, 4).digest


@given(count=st.integers(0, 9), copies=st.integers(1, 5))
def test_shares_deal_out_every_sample_once_with_its_weight(count, copies):
    whole = samples(count)
    parts = [whole.share(copy, copies) for copy in range(copies)]
    assert sum(len(part.tokens) for part in parts) == count
    for copy, part in enumerate(parts):
        numbers = list(range(copy, count, copies))
        assert torch.equal(part.tokens, whole.tokens[numbers])
        assert torch.equal(part.weights, whole.weights[numbers])
        assert torch.equal(part.lengths, whole.lengths[numbers])
        assert part.provenance == whole.provenance


def test_a_copy_that_is_not_there_is_a_mistake_of_the_program():
    with pytest.raises(ValueError, match="copy 2 of 2"):
        samples().share(2, 2)
