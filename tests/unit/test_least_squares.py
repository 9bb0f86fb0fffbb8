"""Ridge regression against the normal equations solved naively on the samples themselves."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_prune.surgery.least_squares import GRID, fitted, ridge, scale


def samples(tokens: int, inputs: int, outputs: int, seed: int):
    generator = torch.Generator().manual_seed(seed)
    draw = lambda *shape: torch.randn(*shape, generator=generator, dtype=torch.float64)
    return draw(tokens, inputs), draw(tokens, outputs), draw(outputs, inputs)


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 30), st.integers(1, 6), st.integers(1, 4), st.sampled_from((0.01, 0.3, 5.0)), st.integers(0, 999))
def test_ridge_is_the_minimum(tokens, inputs, outputs, strength, seed):
    x, t, start = samples(tokens, inputs, outputs, seed)
    found = ridge(x.T @ x, t.T @ x, start, strength)
    # The same problem as plain least squares on rows stacked with the penalty's.
    root = (strength * x.square().sum(dim=0).mean()).sqrt()
    rows = torch.cat([x, root * torch.eye(inputs, dtype=torch.float64)])
    wanted = torch.cat([t, root * start.T])
    expected = torch.linalg.lstsq(rows, wanted).solution.T
    torch.testing.assert_close(found, expected, rtol=1e-7, atol=1e-9)


def test_a_perfect_start_stays():
    x, _, start = samples(20, 5, 3, 1)
    torch.testing.assert_close(ridge(x.T @ x, (x @ start.T).T @ x, start, 0.1), start, rtol=1e-12, atol=1e-12)


def test_features_that_are_always_zero_keep_their_start():
    x, t, start = samples(20, 5, 3, 2)
    x[:, 2] = 0.0
    found = ridge(x.T @ x, t.T @ x, start, 0.0)
    assert found.isfinite().all()
    torch.testing.assert_close(found[:, 2], start[:, 2])


@settings(max_examples=20, deadline=None)
@given(st.integers(2, 3), st.integers(0, 999))
def test_the_strength_is_the_best_across_folds(count, seed):
    parts = [samples(12, 4, 3, seed * 10 + fold) for fold in range(count)]
    start = parts[0][2]
    folds = [(x.T @ x, t.T @ x) for x, t, _ in parts]

    def held_out(strength: float) -> float:
        total = 0.0
        for out in range(count):
            others = [part for fold, part in enumerate(parts) if fold != out]
            x, t = torch.cat([part[0] for part in others]), torch.cat([part[1] for part in others])
            weight = ridge(x.T @ x, t.T @ x, start, strength)
            total += (parts[out][1] - parts[out][0] @ weight.T).square().sum().item()
        return total

    errors = [held_out(strength) for strength in GRID]
    _, found = fitted(folds, start)
    place = GRID.index(found)
    assert all(errors[place] <= errors[near] + 1e-9 for near in (place - 1, place + 1) if 0 <= near < len(GRID))
    whole = fitted(folds, start, found)[0]
    torch.testing.assert_close(whole, ridge(sum(a for a, _ in folds), sum(b for _, b in folds), start, found))


def test_scale_is_the_best_factor():
    x, t, matrix = samples(20, 5, 3, 3)
    best = scale([(x.T @ x, t.T @ x)], matrix)
    error = lambda factor: (t - factor * x @ matrix.T).square().sum().item()
    assert error(best) <= min(error(best * 1.01), error(best * 0.99))
    assert best == pytest.approx(((x @ matrix.T) * t).sum().item() / (x @ matrix.T).square().sum().item())


ALONE = """
import gc, sys
from pathlib import Path
from test_least_squares import fitted, samples
inputs, outputs = map(int, sys.argv[1:])
parts = [samples(inputs, inputs, outputs, seed) for seed in (1, 2)]
folds, start = [(x.T @ x, t.T @ x) for x, t, _ in parts], parts[0][2]
del parts
fitted([(moment[:64, :64], target[:, :64]) for moment, target in folds], start[:, :64])  # libraries get what they keep
resident = lambda name: int(Path("/proc/self/status").read_text().partition(name)[2].split()[1]) * 1024
gc.collect()
before = resident("VmRSS")
Path("/proc/self/clear_refs").write_text("5")  # the peak counts from here
fitted(folds, start)
print(resident("VmHWM") - before)
"""


def test_a_fit_takes_two_matrices_of_the_moments_size_beside_its_folds():
    """What ``planning/passes.py`` counts: the resident peak of a process above what it held before (one of its own: what others
    freed before is not given back to the system)."""
    inputs, outputs = 2000, 300
    beside = {**os.environ, "PYTHONPATH": os.pathsep.join([str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")])}
    run = subprocess.run(
        [sys.executable, "-c", ALONE, str(inputs), str(outputs)], env=beside, capture_output=True, text=True, check=True
    )
    assert int(run.stdout) < 8 * (2 * inputs**2 + 3 * inputs * outputs) * 1.1
