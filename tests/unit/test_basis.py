"""Bases of the residual stream: what they promise about the encoder, the decoder and the tied head."""

from __future__ import annotations

import torch

from megatron_prune.surgery.basis import (
    Basis,
    denominator_spread,
    massive_channels,
    rotation,
    selection,
    tied_rotation,
    tied_scale,
)

HIDDEN, WIDTH = 24, 16


def moment(seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(200, HIDDEN, generator=generator, dtype=torch.float64) * torch.linspace(0.1, 3.0, HIDDEN)
    return x.T @ x / len(x)


def weight(seed: int = 1) -> torch.Tensor:
    return torch.rand(HIDDEN, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) + 0.5


def test_no_cut_changes_nothing():
    rows = torch.randn(5, HIDDEN)
    assert Basis().encoded(rows) is rows


def test_selection_takes_channels():
    rows = torch.randn(5, HIDDEN)
    basis = selection([3, 1, 7], HIDDEN)
    assert torch.equal(basis.encoded(rows), rows[:, [3, 1, 7]])
    assert torch.equal(basis.reading(weight()), torch.eye(HIDDEN, dtype=torch.float64)[:, [3, 1, 7]])


def test_rotation_keeps_the_most_energy():
    second = moment()
    q = rotation(second, WIDTH).encode
    torch.testing.assert_close(q.T @ q, torch.eye(WIDTH, dtype=torch.float64))
    kept = (q.T @ second @ q).diagonal().sum()
    torch.testing.assert_close(kept, torch.linalg.eigvalsh(second)[-WIDTH:].sum())


def test_tied_rotation_decodes_what_it_encodes():
    basis = tied_rotation(moment(), weight(), WIDTH)
    torch.testing.assert_close(basis.decode.T @ basis.encode, torch.eye(WIDTH, dtype=torch.float64))


def test_tied_rotation_at_full_width_gives_the_same_logits_up_to_the_norm():
    """E' = E·P at both ends with the basis's final weight is E·diag(g), for a stream whose norm is left as it was."""
    g, basis = weight(), tied_rotation(moment(), weight(), HIDDEN)
    stream, embedding = torch.randn(7, HIDDEN, dtype=torch.float64), torch.randn(11, HIDDEN, dtype=torch.float64)
    logits = (stream @ basis.encode * basis.final_norm) @ (embedding @ basis.encode).T
    torch.testing.assert_close(logits, (stream * g) @ embedding.T)


def test_channels_without_a_positive_weight_stay_alone():
    g = weight()
    g[5], g[9] = -0.3, 0.0
    alone = massive_channels(moment(), g, WIDTH)
    assert alone[5] and alone[9]
    basis = tied_rotation(moment(), g, WIDTH)
    assert sorted(basis.encode[5].abs().tolist())[-1] == 1.0 and (basis.encode[5] != 0).sum() == 1
    assert basis.encode.isfinite().all() and basis.decode.isfinite().all()


def test_spread_is_zero_for_an_even_norm_and_grows():
    streams = [torch.randn(50, HIDDEN) for _ in range(3)]
    none = torch.zeros(HIDDEN, dtype=torch.bool)
    assert denominator_spread(tied_scale(torch.full((HIDDEN,), 2.0, dtype=torch.float64), none), streams) < 1e-12
    uneven = weight()
    uneven[:2] = 30.0
    assert denominator_spread(tied_scale(uneven, none), streams) > denominator_spread(tied_scale(weight(), none), streams) > 0
