"""The loss between layers: its value and gradient beside a dense computation, what it does not see, which layers it pairs."""

from __future__ import annotations

import pytest
import recovery_reference as reference
import torch
from hypothesis import given
from hypothesis import strategies as st

from megatron_prune.errors import InputError
from megatron_prune.recovery.hidden_match import layer_pairs, linear_cka


def draw(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)) + 0.3


def test_value_and_gradient_are_those_of_the_cross_covariances():
    one, other = draw(11, 3, 8).requires_grad_(), draw(11, 3, 20, seed=1)
    again = one.detach().clone().requires_grad_()
    loss = 1 - linear_cka(one, other).mean()
    wanted = reference.unlikeness(again.transpose(0, 1), other.transpose(0, 1))
    (loss * 3).backward()
    (wanted * 3).backward()
    assert loss.item() == pytest.approx(wanted.item(), rel=1e-6) and 0.3 < wanted.item() < 0.9
    torch.testing.assert_close(one.grad, again.grad.float(), rtol=1e-4, atol=1e-7)


def test_a_turned_and_scaled_stream_is_the_same_stream():
    hidden = draw(9, 2, 6)
    turn = torch.linalg.qr(draw(6, 6, seed=2)).Q
    assert linear_cka(hidden, -4.0 * hidden @ turn).tolist() == pytest.approx([1.0, 1.0], abs=1e-6)


def test_one_token_of_massive_activations_does_not_decide():
    one, other = draw(30, 1, 8), draw(30, 1, 8, seed=3)
    before = linear_cka(one, other).item()
    one[4] *= 1e4
    other[4] *= 1e4
    assert linear_cka(one, other).item() == pytest.approx(before, abs=1e-5)


@pytest.mark.parametrize(
    "student, teacher, kept, chosen, pairs",
    [
        (4, 4, None, (), [(0, 0), (1, 1), (2, 2), (3, 3)]),
        (2, 2, None, (), [(0, 0), (1, 1)]),
        (8, 8, None, (), [(1, 1), (3, 3), (5, 5), (7, 7)]),
        (3, 6, [0, 3, 5], (0, 1, 2), [(0, 2), (1, 4), (2, 5)]),
        (3, 6, [1, 2, 3], (2, 0), [(2, 5), (0, 1)]),
        (1, 6, [2], (), [(0, 5)]),
    ],
)
def test_a_layer_stands_for_the_teachers_up_to_the_next_that_was_kept(student, teacher, kept, chosen, pairs):
    assert layer_pairs(student, teacher, kept, chosen) == pairs


@given(st.integers(1, 40), st.data())
def test_pairs_are_in_order_and_end_with_the_last_layers(teacher, data):
    kept = sorted(data.draw(st.sets(st.integers(0, teacher - 1), min_size=1)))
    pairs = layer_pairs(len(kept), teacher, kept, ())
    own, theirs = [pair[0] for pair in pairs], [pair[1] for pair in pairs]
    assert 1 <= len(pairs) <= 4 and pairs[-1] == (len(kept) - 1, teacher - 1)
    assert own == sorted(set(own)) and theirs == sorted(set(theirs))
    assert all(kept[mine] <= other for mine, other in pairs)


@pytest.mark.parametrize(
    "student, teacher, kept, chosen, message",
    [
        (3, 2, None, (), "not cut from this teacher"),
        (2, 4, [1, 2, 3], (), "not cut from this teacher"),
        (2, 4, [1, 4], (), "not cut from this teacher"),
        (2, 4, [1, 3], (2,), r"--hidden-layers.*\[2\].*0 to 1"),
        (2, 4, [1, 3], (0, -1), r"--hidden-layers.*\[-1\].*0 to 1"),
    ],
)
def test_layers_that_do_not_exist_are_refused(student, teacher, kept, chosen, message):
    with pytest.raises(InputError, match="(?s)" + message):
        layer_pairs(student, teacher, kept, chosen)
